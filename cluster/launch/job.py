"""What is to be run, and on how much."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixcl_dist.cluster.errors import ClusterError

REQUEUE = 75
"""Exit code of a run that was told to stop, has saved its state and is to be started again (EX_TEMPFAIL)."""
PORT = 29511
"""Where rank 0 listens unless the scheduler or the user says otherwise."""
DOCTOR = ("doctor", "--cluster")
"""Of no run: looks at the machines."""
ID_VARIABLE = "MIXCL_JOB"
"""Names, to its processes, the job that they belong to."""


class LaunchError(ClusterError):
    """A job that cannot be started as asked; the message is one line with the cure."""


@dataclass(frozen=True)
class Job:
    """A `mixcl` command, run by `nodes` × `processes` processes that make one group."""

    command: tuple[str, ...]
    """Arguments of `mixcl`, e.g. ("pretrain", "--data", "shards", "--run", "runs/a")."""
    nodes: int = 1
    processes: int = 1
    """Processes on each node: one for each GPU, or as many as there are shares of its cores."""
    gpus: int = 0
    """GPUs of each node, 0 for a job on CPUs."""
    threads: int = 1
    """CPU cores of each process."""
    id: str = ""
    """The same for all starts of this job, which do not overlap: a start takes over what a killed one left locked."""

    def __post_init__(self) -> None:
        if not self.command:
            raise LaunchError("there is nothing to run; give a command behind --, e.g. -- pretrain --data …")
        if "--resume" in self.command:
            raise LaunchError("leave out --resume: a job goes on from the newest checkpoint by itself")
        if self.command[0] != "pretrain" and self.command[:2] != DOCTOR:
            raise LaunchError(
                f"{self.command[0]} is no distributed command; give -- pretrain …, or -- {' '.join(DOCTOR)}"
            )
        if self.gpus and self.processes != self.gpus:
            raise LaunchError(f"{self.processes} processes for {self.gpus} GPUs of a node; each process takes one GPU")
        for name in ("nodes", "processes", "threads"):
            if getattr(self, name) < 1:
                raise LaunchError(f"{name} {getattr(self, name)}: at least 1 is needed")

    @property
    def run(self) -> Path:
        """The run's folder, which every node must see."""
        return Path(_option(self.command, "--run"))

    @property
    def read(self) -> list[Path]:
        """Folders that every node must see, too."""
        data = _option(self.command, "--data")
        return [] if "://" in data else [Path(data)]

    @property
    def name(self) -> str:
        return "mixcl-doctor" if self.command[0] == "doctor" else f"mixcl-{self.run.name}"

    @property
    def environment(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads)} | ({ID_VARIABLE: self.id} if self.id else {})

    def shell(self, command: Sequence[str]) -> str:
        """A line of sh that runs `command`, which begins this job's run, or goes on with it where it has begun."""
        if self.command[0] == "doctor":
            return f"exec {shlex.join(command)}"
        begun = shlex.quote(str(self.run / "run.json"))
        return f'if [ -e {begun} ]; then set -- --resume latest; else set --; fi; exec {shlex.join(command)} "$@"'


def torchrun(job: Job, where: Sequence[str], *, python: str) -> list[str]:
    """The command that starts the processes of one node; `where` says which node it is and where the first one is."""
    processes = f"--nproc-per-node={job.processes}"
    # `--` keeps torchrun from taking --run for one of its own options.
    program = ["--no-python", "--", python, "-m", "mixcl_dist", *job.command]
    return [python, "-m", "torch.distributed.run", processes, *where, *program]


def _option(command: Sequence[str], name: str) -> str:
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == name and following:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    raise LaunchError(f"{command[0]} has no {name}; give it behind --")
