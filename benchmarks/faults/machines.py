"""Two hosts on one machine, as network namespaces on a bridge, each with a name and an ssh server of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NEEDED = {"ip": "iproute2", "nsenter": "util-linux", "sshd": "openssh-server", "ssh": "openssh-client"}
ADDRESS = "10.77.0.{}"
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
SSHD = """
Port 22
ListenAddress {address}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/{name}.pid
StrictModes no
UsePAM no
PermitRootLogin yes
PrintMotd no
SetEnv PYTHONPATH={python_path} PATH={path}
"""
SSH = """
Host *
  User root
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def missing() -> str | None:
    """What has to be installed, or another reason for which there can be no such hosts."""
    if lacking := [package for name, package in NEEDED.items() if shutil.which(name, path=PATH) is None]:
        return f"{', '.join(lacking)} missing; apt-get install {' '.join(lacking)}"
    return "network namespaces need root" if os.getuid() else None


@dataclass(frozen=True)
class Machines:
    """Hosts by name, which see each other and the same files."""

    folder: Path
    names: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """In which `ssh NAME` reaches a host."""
        return os.environ | {"PATH": f"{self.folder}{os.pathsep}{PATH}"}

    def start(self, name: str) -> None:
        """Switch a host on."""
        for command in (
            ["mkdir", "-p", "/run/sshd"],
            [shutil.which("sshd", path=PATH), "-f", self.folder / f"{name}.conf"],
        ):
            subprocess.run([*self.inside(name), *command], check=True)

    def inside(self, name: str) -> list[str]:
        """Words before a command that is to run on a host."""
        enter = ["nsenter", f"--net=/run/netns/{self._space(name)}", "unshare", "--uts", "--mount"]
        set_up = f'hostname {name} && mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        return [*enter, "sh", "-c", set_up, name]

    def kill(self, name: str) -> None:
        """As if its power was cut: every process."""
        while pids := _out("ip", "netns", "pids", self._space(name)).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)

    def cut_off(self, name: str) -> None:
        self._link(name, "down")

    def connect(self, name: str) -> None:
        self._link(name, "up")

    def _link(self, name: str, state: str) -> None:
        _out("ip", "-n", self._space("bridge"), "link", "set", f"to-{name}", state)

    def _space(self, name: str) -> str:
        return f"{self.folder.name}-{name}"

    def set_up(self) -> None:
        bridge, hub = self._space("bridge"), ADDRESS.format(254)
        _out("ip", "netns", "add", bridge)
        _out("ip", "-n", bridge, "link", "add", "hub", "type", "bridge")
        _out("ip", "-n", bridge, "address", "add", f"{hub}/24", "dev", "hub")
        _out("ip", "-n", bridge, "link", "set", "hub", "up")
        _out("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key"))
        addresses = {name: ADDRESS.format(number) for number, name in enumerate(self.names, 1)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        hosts = [f"Host {name}\n  HostName {address}\n" for name, address in addresses.items()]
        (self.folder / "ssh_config").write_text("".join(hosts) + SSH.format(folder=self.folder))
        ssh = self.folder / "ssh"
        config = self.folder / "ssh_config"
        ssh.write_text(f'#!/bin/sh\nexec nsenter --net=/run/netns/{bridge} {shutil.which("ssh")} -F {config} "$@"\n')
        ssh.chmod(0o755)
        for name, address in addresses.items():
            self._add(name, address, bridge)

    def _add(self, name: str, address: str, bridge: str) -> None:
        space = self._space(name)
        _out("ip", "netns", "add", space)
        pair = ["type", "veth", "peer", "name", "eth0", "netns", space]
        _out("ip", "-n", bridge, "link", "add", f"to-{name}", *pair)
        _out("ip", "-n", bridge, "link", "set", f"to-{name}", "master", "hub")
        _out("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _out("ip", "-n", space, "link", "set", device, "up")
        self.connect(name)
        known = {"folder": self.folder, "name": name, "address": address, "path": PATH}
        known |= {"python_path": os.environ.get("PYTHONPATH") or "/"}
        (self.folder / f"{name}.conf").write_text(SSHD.format(**known))
        self.start(name)

    def tear_down(self) -> None:
        for name in self.names:
            self.kill(name)
        for name in (*self.names, "bridge"):
            subprocess.run(["ip", "netns", "delete", self._space(name)], env=os.environ | {"PATH": PATH}, check=False)


@contextmanager
def machines(names: Sequence[str] = ("a", "b")) -> Iterator[Machines]:
    with tempfile.TemporaryDirectory(prefix="mixcl-") as folder:
        these = Machines(Path(folder), tuple(names))
        try:
            these.set_up()
            yield these
        finally:
            these.tear_down()


def _out(*command: str) -> str:
    environment = os.environ | {"PATH": PATH}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
