"""Hosts that a remote shell reaches, this one among them: one torchrun on each, ended together.

torchrun's own elastic groups end with the host at which they meet, whichever that is; here it is the launcher that
notices a lost host, starts the others again where they stood, and all of them once it is back.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mixcl_dist.cluster.launch.job import ID_VARIABLE, PORT, Job, LaunchError, torchrun

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=5")
"""Ends some 15 seconds after a host ceased to answer."""
ANSWER_S = 10.0
"""Seconds in which a host that is there answers."""
LOOK_EVERY_S, LOOK_FOR_LOST_EVERY_S = 0.5, 5.0
KILL = b"kill\n"
GRACE_S = 30.0
"""Seconds for processes that were told to stop to save and to end."""


def commands(job: Job, hosts: Sequence[str], *, shell: Sequence[str] = SSH, port: int = PORT) -> list[list[str]]:
    """What is run for each of `hosts`, which see the same folders under the same names; the first is where the group
    meets. Without hosts it is this machine alone."""
    if not hosts:
        return [["sh", "-c", _there(job, job.shell(torchrun(job, ["--standalone"], python=sys.executable)))]]
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


def run(job: Job, hosts: Sequence[str], *, shell: Sequence[str] = SSH, port: int = PORT, failures: int = 0) -> int:
    """Run the job on all of `hosts`, or here; returns 0 where all processes ended so, else the first failure's code.

    Where it failed as hosts were lost, at most `failures` times, it goes on with those that answer; once the others
    answer again, it saves and goes on with all. Told to stop, it tells all processes, which save, and waits for them.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    present = list(hosts)
    while True:
        lost = [host for host in hosts if host not in present]
        size = dataclasses.replace(job, nodes=len(present) or 1)
        with _started(commands(size, present, shell=shell, port=port)) as processes:
            code = _wait(processes, lost, shell)
            if code == 0:
                return 0
            answering = _answering(hosts, shell)
            if code and len(answering) < len(present):
                _kill(processes)
        returned = set(answering) - set(present)
        if not answering or not (returned or len(answering) < len(present)) or (failures == 0 and not returned):
            return code or 1
        failures -= not returned
        present = answering
        told = [host for host in hosts if host not in present]
        why = f"{', '.join(told)} does not answer; goes on with" if told else "all hosts answer; goes on with"
        print(f"mixcl launch: {why} {', '.join(present)}", file=sys.stderr)


@contextmanager
def _started(commands: Sequence[Sequence[str]]) -> Iterator[list[subprocess.Popen]]:
    """The processes, side by side; what still runs in the end is told to stop by the end of its input."""
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for command in commands]
    try:
        yield processes
    finally:
        for process in processes:
            assert process.stdin, "is a pipe"
            with suppress(OSError):
                process.stdin.close()
        _end(processes, GRACE_S)
        for process in processes:
            process.kill()
            process.wait()


def _kill(processes: Sequence[subprocess.Popen]) -> None:
    """End ranks that wait for those of a lost host: they can save nothing, and may wait for longer than anyone."""
    for process in processes:
        assert process.stdin, "is a pipe"
        with suppress(OSError):
            process.stdin.write(KILL)
            process.stdin.flush()


def _wait(processes: Sequence[subprocess.Popen], lost: Sequence[str], shell: Sequence[str]) -> int | None:
    """The first failure's code, 0 where there was none, or None once one of `lost` answers."""
    look_at = time.monotonic() + LOOK_FOR_LOST_EVERY_S
    while None in (codes := [process.poll() for process in processes]) and not any(codes):
        time.sleep(LOOK_EVERY_S)
        if lost and time.monotonic() > look_at:
            if _answering(lost, shell):
                return None
            look_at = time.monotonic() + LOOK_FOR_LOST_EVERY_S
    return next((code for code in codes if code), 0)


def _answering(hosts: Sequence[str], shell: Sequence[str]) -> list[str]:
    """Those of `hosts`, all asked at once, that run a command within some seconds."""
    asked = {
        host: subprocess.Popen([*shell, host, "true"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for host in hosts
    }
    _end(list(asked.values()), ANSWER_S)
    for process in asked.values():
        process.kill()
        process.wait()
    return [host for host, process in asked.items() if process.returncode == 0]


def _end(processes: Sequence[subprocess.Popen], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def _there(job: Job, line: str) -> str:
    """The line as it is run on a host: in the folder that this one is in, with the job's variables. It is told to stop
    by SIGTERM where its input ends, as it does with the connection; where `KILL` comes, the whole job is killed, whose
    ranks are in sessions of their own."""
    variables = "".join(f"export {name}={shlex.quote(value)}; " for name, value in job.environment.items())
    ranks = f"grep -lzx {shlex.quote(f'{ID_VARIABLE}={job.id}')} /proc/[0-9]*/environ | cut -d/ -f3"
    watched = (
        f"exec 3<&0; sh -c {shlex.quote(line)} 3<&- </dev/null & child=$!; "
        f'{{ if read -r word <&3 && [ "$word" = kill ]; then kill -KILL $child $({ranks}); '
        "else kill -TERM $child; fi; } >/dev/null 2>&1 & watch=$!; "
        "exec 3<&-; wait $child; code=$?; kill $watch 2>/dev/null; exit $code"
    )
    return f"cd {shlex.quote(os.getcwd())} && {{ {variables}{watched}; }}"
