"""The group of processes that this one belongs to, as torchrun, srun, mpirun or mpiexec described it."""

from __future__ import annotations

import atexit
import os
import re
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from mixcl_dist.cluster.errors import ClusterError

PORTS = range(20_000, 30_000)
"""Below those that systems give away by themselves."""


class GroupError(ClusterError):
    """A group that is described in part or wrongly; the message is one line that names the variables."""


class ToldError(ClusterError):
    """What ends all ranks alike, on one that leaves it to rank 0 to say so."""


def told_by_first(error: ValueError, rank: int) -> ValueError:
    """What `rank` is to raise where all of them end by `error`."""
    return error if rank == 0 else ToldError(str(error))


@dataclass(frozen=True)
class Group:
    """The place of this process among those that train one network."""

    rank: int = 0
    local_rank: int = 0
    """Among those of the same machine."""
    world_size: int = 1
    address: str = "127.0.0.1"
    """Of the machine of rank 0."""
    port: int | None = None
    """Where rank 0 listens; None: nowhere, as there is nobody else."""


class _Launcher(NamedTuple):
    name: str
    world_size: str
    rank: str
    local_rank: str


# In this order: mpirun and mpiexec start their processes by srun where they can, so that srun's variables are there,
# too, and describe something else.
_TORCHRUN = _Launcher("torchrun", "WORLD_SIZE", "RANK", "LOCAL_RANK")
_OPEN_MPI = _Launcher("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
_HYDRA = _Launcher("mpiexec", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID")
_SLURM = _Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")


def described(environment: Mapping[str, str] = os.environ) -> Group:
    """The group of this process; a group of one where no launcher described another. Raises `GroupError`.

    The head's address and port are MASTER_ADDR and MASTER_PORT, which torchrun sets; for the other launchers they are
    taken from the job where it tells them.
    """
    if "WORLD_SIZE" in environment or "RANK" in environment:
        return _torchrun(environment)
    for launcher in (_OPEN_MPI, _HYDRA, _SLURM):
        if launcher.world_size in environment and launcher.local_rank in environment:
            return _started_by(launcher, environment)
    if _number(environment, _SLURM.rank, default=0) > 0:
        raise GroupError(
            f"{_SLURM.rank} is {environment[_SLURM.rank]}, but {_SLURM.world_size} is not set, so that this would be "
            "another first process; start with srun, or unset the SLURM_ variables"
        )
    return Group()


def check_address(group: Group) -> None:
    """Raise `GroupError` where the machine of rank 0 has a name that is not known here, which would be waited for."""
    try:
        socket.getaddrinfo(group.address, group.port)
    except OSError:
        raise GroupError(
            f"{group.address}, the machine of rank 0, is not known here; set MASTER_ADDR to its name or address"
        ) from None


def leave(code: int) -> NoReturn:
    """End this process. One of several ranks ends without Python's teardown, after what `atexit` was given.

    A thread of gloo may have a tensor to release at any time, and asks for the interpreter's lock then. An interpreter
    that is being torn down answers by ending that thread, and so the process, by SIGABRT: the code would be lost.
    """
    try:
        several = described().world_size > 1
    except GroupError:
        several = False
    if not several:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _torchrun(environment: Mapping[str, str]) -> Group:
    world_size = _number(environment, "WORLD_SIZE", least=1)
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environment.get(name)]
    if world_size == 1 and _number(environment, "RANK", default=0) == 0:
        return Group()
    if missing:
        raise GroupError(f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set; {_cure('WORLD_SIZE')}")
    return _placed(_TORCHRUN, environment, environment["MASTER_ADDR"], _port(environment))


def _started_by(launcher: _Launcher, environment: Mapping[str, str]) -> Group:
    if _number(environment, launcher.world_size, least=1) == 1:
        return Group()
    address = environment.get("MASTER_ADDR") or _head(launcher, environment)
    if not address:
        raise GroupError(
            f"{launcher.name} started this process on several machines and does not tell which has rank 0; set "
            "MASTER_ADDR to its name"
        )
    port = _port(environment) if environment.get("MASTER_PORT") else _port_of_job(environment)
    return _placed(launcher, environment, address, port)


def _placed(launcher: _Launcher, environment: Mapping[str, str], address: str, port: int) -> Group:
    world_size = _number(environment, launcher.world_size, least=1)
    rank = _number(environment, launcher.rank)
    if rank >= world_size:
        raise GroupError(
            f"{launcher.rank} is {rank}, but {launcher.world_size} is {world_size}; {_cure(launcher.rank)}"
        )
    return Group(rank, _number(environment, launcher.local_rank, default=0), world_size, address, port)


def _head(launcher: _Launcher, environment: Mapping[str, str]) -> str | None:
    """The machine of rank 0, where the launcher or the job tells it."""
    local_size = {_OPEN_MPI: "OMPI_COMM_WORLD_LOCAL_SIZE", _HYDRA: "MPI_LOCALNRANKS"}.get(launcher)
    if local_size and environment.get(local_size) == environment[launcher.world_size]:
        return "127.0.0.1"
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    hosts = next((environment[name] for name in names if environment.get(name)), None)
    return hosts and first_host(hosts)


def first_host(hosts: str) -> str:
    """The first name of a list as SLURM writes it: "gpu[007-010,12]-ib,other" begins with "gpu007-ib"."""
    whole = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert whole, "the pattern matches anything"
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", whole.group())


def _port_of_job(environment: Mapping[str, str]) -> int:
    """The same on every rank of a job, and seldom that of another job on the machine."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
    job = " ".join(environment.get(name, "") for name in names)
    return PORTS[sum(number * 31**place for place, number in enumerate(job.encode())) % len(PORTS)]


def _port(environment: Mapping[str, str]) -> int:
    port = _number(environment, "MASTER_PORT", least=1)
    if port > 65_535:
        raise GroupError(f"MASTER_PORT is {port}; {_cure('MASTER_PORT')}")
    return port


def _number(environment: Mapping[str, str], name: str, *, least: int = 0, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        what = "not set" if text is None else f"{text!r}, which is no number of at least {least}"
        raise GroupError(f"{name} is {what}; {_cure(name)}")
    return int(text)


def _cure(name: str) -> str:
    """What to do about a variable that does not fit the others, so that a process finds its group or is one alone."""
    if name == "MASTER_PORT":
        return "give a port from 1 to 65535"
    if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        return "start with torchrun, srun or mpirun, or unset RANK and WORLD_SIZE"
    prefix = name.partition("_")[0]
    return f"start with {'srun' if prefix == 'SLURM' else 'mpirun or mpiexec'}, or unset the {prefix}_ variables"
