"""Hosts that a remote shell reaches, this one among them: one torchrun on each, ended together."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mixcl_dist.cluster.launch.job import PORT, Job, LaunchError, torchrun

SSH = ("ssh", "-tt", "-o", "BatchMode=yes")
"""With a terminal, so that what runs there ends with the connection."""
LOOK_EVERY_S = 0.5
GRACE_S = 30.0
"""Seconds for the other hosts to end by themselves once one has failed."""


def commands(job: Job, hosts: Sequence[str], *, shell: Sequence[str] = SSH, port: int = PORT) -> list[list[str]]:
    """What is run for each of `hosts`, which see the same folders under the same names; the first is where the group
    meets. Without hosts it is this machine alone."""
    if not hosts:
        return [["sh", "-c", job.shell(torchrun(job, ["--standalone"], python=sys.executable))]]
    if len(set(hosts)) != len(hosts):
        raise LaunchError(f"hosts {', '.join(hosts)}: one is named twice; leave it out")
    meeting = [f"--nnodes={len(hosts)}", f"--master-addr={hosts[0]}", f"--master-port={port}"]
    return [
        [*shell, host, _there(job, job.shell(torchrun(job, [*meeting, f"--node-rank={rank}"], python=sys.executable)))]
        for rank, host in enumerate(hosts)
    ]


def read_hosts(text: str) -> list[str]:
    """Names separated by commas, or a file with one on each line; raises `LaunchError` for none."""
    file = Path(text)
    names = file.read_text().split("\n") if file.is_file() else text.split(",")
    hosts = [host for name in names if (host := name.partition("#")[0].strip())]
    if not hosts:
        raise LaunchError(f"hosts {text}: names no host; give a,b or a file with one on each line")
    return hosts


def run(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> int:
    """Run them side by side; the exit code is 0 where all ended so, else the first failure's, which ends the others.

    Told to stop, it tells all of them and waits for them.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    processes = [subprocess.Popen(command, env=os.environ | environment) for command in commands]
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(LOOK_EVERY_S)
        if failed := next((code for code in codes if code), 0):
            _wait(processes, GRACE_S)
        return failed
    finally:
        for process in processes:
            process.terminate()
        _wait(processes, GRACE_S)
        for process in processes:
            process.kill()


def _wait(processes: Sequence[subprocess.Popen], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def _there(job: Job, line: str) -> str:
    """The line as it is run on a host: in the folder that this one is in, with the job's variables."""
    variables = "".join(f"export {name}={shlex.quote(value)}; " for name, value in job.environment.items())
    return f"cd {shlex.quote(os.getcwd())} && {{ {variables}{line}; }}"
