"""A real SLURM on this machine: three nodes, a controller and a key of their own; and what is pre-trained in it."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from mixcl_dist.config import load
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.phantom import write_cohort

from ...ports import free_port

STEPS = 120
SMALL = {
    "network.filters": "4,6,8", "network.voxel_dim": "8", "network.crop_dim": "8", "views.size": "16,16,16",
    "rows.per_view_pair": "32", "data.workers": "0", "pretrain.batch_size": "4", "pretrain.steps": STEPS,
    "pretrain.log_every": "1", "pretrain.gradient_norms_every": "0", "checkpoint.every": "20", "engine.timeout_s": "60",
}  # fmt: skip
SETTINGS = tuple(word for key, value in SMALL.items() for word in (f"--{key}", str(value)))
"""Of a pre-training of less than half a minute, long enough for things to happen to it."""

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
NodeName=n3 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n3_port} CPUs=4 RealMemory=8000
PartitionName=all Nodes=n[1-3] Default=YES MaxTime=60 State=UP
"""
NODES = ("n1", "n2", "n3")
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")


@dataclass
class Slurm:
    """Its nodes, and what asks them."""

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

    def run_time_s(self, job: str) -> int:
        """Of the job's present turn."""
        hours, minutes, seconds = (
            self.ask("scontrol", "show", "job", job).partition("RunTime=")[2].split()[0].split(":")
        )
        return 3600 * int(hours) + 60 * int(minutes) + int(seconds)

    def wait(self, job: str, *states: str, seconds: float) -> str:
        """The state of the job once it is one of `states`."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {state}\n{self.ask('scontrol', 'show', 'job', job)}")
            time.sleep(0.5)
        return state

    def start_node(self, name: str) -> None:
        # Its ranks find a node by its name, as on a real cluster.
        named = f"mount --bind {self.folder / 'hosts'} /etc/hosts && exec slurmd -D -N {name}"
        self._start(name, "unshare", "--mount", "sh", "-c", named)

    def kill_node(self, name: str) -> None:
        """As if its power was cut: the daemon and all that it started."""
        daemon = psutil.Process(self.processes.pop(name).pid)
        mine = [process for process in psutil.process_iter() if self._runs_on(process, name)]
        steps = [parent for process in mine for parent in process.parents() if parent.name() == "slurmstepd"]
        for process in [daemon, *steps, *mine]:
            _kill(process)

    @contextmanager
    def paused(self, ranks_of: str) -> Iterator[None]:
        """Ranks whose command has these words do nothing, and get no signal, within the block."""
        nodes = [process for process in psutil.process_iter() if any(self._runs_on(process, node) for node in NODES)]
        ranks = [process for process in nodes if ranks_of in process.cmdline() and "srun" not in process.name()]
        for rank in ranks:
            rank.suspend()
        try:
            yield
        finally:
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):  # one that has ended meanwhile is what the test then tells of
                    rank.resume()

    def _runs_on(self, process: psutil.Process, node: str) -> bool:
        try:
            environment = process.environ()
        except psutil.Error:
            return False
        ours = environment.get("SLURM_CONF") == str(self.folder / "slurm.conf")
        return ours and environment.get("SLURMD_NODENAME") == node

    def _start(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self.processes[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def _path() -> str:
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


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
    ports = {name: free_port() for name in ("ctld_port", *(f"{node}_port" for node in NODES))}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, **ports))
    (folder / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()} {' '.join(NODES)}\n")
    for name in ("state", *(f"spool.{node}" for node in NODES)):
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
    for name in NODES:
        one.start_node(name)
    deadline = time.monotonic() + 60
    while _idle(one) < len(NODES):
        if time.monotonic() > deadline:
            raise TimeoutError((folder / "slurmctld.log").read_text()[-2000:])
        time.sleep(0.3)


def _idle(one: Slurm) -> int:
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], env=one.environment, capture_output=True, text=True)
    return done.stdout.split().count("idle")


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    cohort = write_cohort(folder, training=4, validation=0, unlabelled=2, size=(40, 34, 40), spacing_mm=9.0)
    build(cohort, folder / "shards", load(overrides=[("build.patch_size", "24,24,24")]).build)
    return folder / "shards"


@pytest.fixture(scope="session")
def undisturbed(shards, tmp_path_factory) -> str:
    """The weights that two ranks come to on their own."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    local = [sys.executable, "-m", "mixcl_dist", "launch", "local", "--processes", "2", "--"]
    subprocess.run([*local, "pretrain", "--data", shards, "--run", run, *SETTINGS], check=True, capture_output=True)
    return digest_of_weights(run)


def digest_of_weights(run: Path) -> str:
    return hashlib.sha256((run / "pretrain.safetensors").read_bytes()).hexdigest()
