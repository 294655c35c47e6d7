"""A real SLURM on this machine: two nodes, a controller and a key of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

CONFIGURATION = """
ClusterName=mixcl
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=30
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1_port} CPUs=4 RealMemory=8000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2_port} CPUs=4 RealMemory=8000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")


@dataclass
class Slurm:
    """Two nodes, n1 and n2, and what asks them."""

    folder: Path
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    def state(self, job: str) -> str:
        return self.ask("scontrol", "show", "job", job).partition("JobState=")[2].split()[0]

    def wait(self, job: str, *states: str, seconds: float) -> str:
        """The state of the job once it is one of `states`."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {state}\n{self.ask('scontrol', 'show', 'job', job)}")
            if state == "PENDING":  # a job that was requeued would wait for longer than its test
                subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=self.environment)
            time.sleep(0.5)
        return state

    def start_node(self, name: str) -> None:
        self._start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """As if its power was cut: the daemon and all that it started."""
        daemon = psutil.Process(self.processes.pop(name).pid)
        spool = str(self.folder / f"spool.{name}")
        steps = [p for p in psutil.process_iter(["cmdline"]) if "slurmstepd" in " ".join(p.info["cmdline"] or [])]
        mine = [step for step in steps if _opens(step, spool) or step.ppid() == daemon.pid]
        for process in [daemon, *mine, *(child for step in mine for child in step.children(recursive=True))]:
            _kill(process)

    def _start(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self.processes[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def _opens(process: psutil.Process, path: str) -> bool:
    try:
        return any(file.path.startswith(path) for file in process.open_files()) or path in process.cwd()
    except psutil.Error:
        return False


def _path() -> str:
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """Skips by name where SLURM or munge is missing, or the tests are not root's."""
    if missing := [name for name in NEEDED if shutil.which(name, path=_path()) is None]:
        pytest.skip(f"{', '.join(missing)} missing; apt-get install slurm-wlm munge")
    if os.getuid():
        pytest.skip("a SLURM of one's own needs root")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short, for its sockets
    one = Slurm(folder)
    try:
        _set_up(one)
        yield one
    finally:
        for process in one.processes.values():
            process.send_signal(signal.SIGKILL)
        for process in psutil.process_iter(["cmdline"]):
            if str(folder) in " ".join(process.info["cmdline"] or []):
                _kill(process)
        shutil.rmtree(folder, ignore_errors=True)


def _set_up(one: Slurm) -> None:
    folder = one.folder
    ports = {name: _free_port() for name in ("ctld_port", "n1_port", "n2_port")}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, **ports))
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    places = {"key-file": key, "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
    places |= {"seed-file": "munge.seed"}
    munged = ["munged", "--foreground", "--force", *(f"--{name}={folder / place}" for name, place in places.items())]
    one._start("munged", *munged)
    while not (folder / "munge.socket").exists():
        time.sleep(0.1)
    one._start("slurmctld", "slurmctld", "-D", "-i")
    for name in ("n1", "n2"):
        one.start_node(name)
    deadline = time.monotonic() + 60
    while _idle(one) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError((folder / "slurmctld.log").read_text()[-2000:])
        time.sleep(0.3)


def _idle(one: Slurm) -> int:
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], env=one.environment, capture_output=True, text=True)
    return done.stdout.split().count("idle")
