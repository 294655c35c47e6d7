"""Two "machines" on this one: network namespaces joined by a cable, each with a Ray node that can be killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ADDRESSES = {"a": "10.77.31.1", "b": "10.77.31.2"}
PORT = 6411
HEALTH = {"period_ms": "1000", "timeout_ms": "1000", "failure_threshold": "3", "initial_delay_ms": "1000"}
SOON = {f"RAY_health_check_{key}": value for key, value in HEALTH.items()}
"""A lost machine is noticed after seconds."""
ALONE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
"""Nobody else is on the cable, so nobody has to prove who they are."""


def can_be_made() -> bool:
    return os.getuid() == 0 and shutil.which("ip") is not None and _ip("netns", "list", check=False) == 0


class TwoHosts:
    """A Ray cluster of the hosts "a" (its head) and "b", with two cores each, in a folder of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.environment = folder, os.environ | SOON | ALONE
        self.spaces = {host: f"{name}-{host}" for host in ADDRESSES}
        for space in self.spaces.values():
            _ip("netns", "add", space)
        a, b = self.spaces.values()
        _ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        for host, space in self.spaces.items():
            _ip("-n", space, "addr", "add", f"{ADDRESSES[host]}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", space, "link", "set", device, "up")

    @property
    def address(self) -> str:
        return f"{ADDRESSES['a']}:{PORT}"

    def start(self, host: str) -> None:
        head = ["--head", f"--port={PORT}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
        where = head if host == "a" else [f"--address={self.address}"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, f"--node-ip-address={ADDRESSES[host]}"]
        command = self.command(host, [*ray, "--num-cpus=2", "--object-store-memory=80000000"])
        subprocess.run(command, env=self.environment, check=True, stdout=subprocess.DEVNULL, timeout=120)

    def command(self, host: str, words: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.spaces[host], *words]

    def pids(self, host: str, named: str = "") -> list[int]:
        found = subprocess.run(
            ["ip", "netns", "pids", self.spaces[host]], capture_output=True, text=True
        ).stdout.split()
        return [int(pid) for pid in found if named in _name(pid)]

    def kill(self, host: str, named: str = "") -> None:
        for pid in self.pids(host, named):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def end(self) -> None:
        for host, space in self.spaces.items():
            while self.pids(host):
                self.kill(host)
                time.sleep(0.2)
            _ip("netns", "del", space, check=False)


def _name(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except OSError:
        return ""


def _ip(*words: str, check: bool = True) -> int:
    return subprocess.run(["ip", *words], check=check, capture_output=True).returncode
