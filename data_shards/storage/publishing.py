"""Files that appear whole or not at all, and a lock that one process holds."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mixcl_dist.data_shards.errors import DataError

ORPHANS_END_S = 10.0
"""How long the children of a killed holder, which have its lock, may take to end."""


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears as `path` only once its last byte has reached the disk.

    The temporary name is unique, so that a writer orphaned by a killed build cannot spoil its successor's file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_unpublished(folder: Path) -> None:
    """Delete what killed writers left below `folder`."""
    for temporary in folder.rglob(".*.tmp"):
        temporary.unlink(missing_ok=True)


class HeldError(DataError):
    """A lock that another process holds, or that a machine left behind."""


class Holder(NamedTuple):
    """Who works in a place."""

    host: str
    pid: int
    job: str = ""

    def is_of(self, job: str) -> bool:
        return bool(job) and self.job == job

    def runs(self) -> bool:
        """Whether the process of this machine runs; one of another is believed to."""
        ours = self.host == os.uname().nodename
        return not ours or Path(f"/proc/{self.pid}").exists() or not Path("/proc/self").exists()


@contextmanager
def exclusive(path: Path, warn: Callable[[str], None] = lambda line: None, *, job: str = "") -> Iterator[None]:
    """Hold the lock file `path`, in which stands "host pid job" as long as it is held; raises `HeldError`.

    What a process of this machine left when it was killed is taken over, told to `warn` in one line. A process of
    another machine cannot be asked whether it lives, where the file system does not tell by itself: it is believed,
    unless it is of the same `job`, which a scheduler names and starts again only once it has ended.
    """
    ours = Holder(os.uname().nodename, os.getpid(), job)
    with _locked(path, ours) as file:
        earlier = _holder(file.fileno())
        if earlier and earlier.host != ours.host and not earlier.is_of(job):
            raise HeldError(
                f"process {earlier.pid} of machine {earlier.host} is working here; if it runs no more, delete {path}"
            )
        if earlier:
            warn(f"{path}: process {earlier.pid} was ended while it worked here; its place is taken")
        os.truncate(file.fileno(), 0)
        os.pwrite(file.fileno(), f"{ours.host} {ours.pid} {job}".strip().encode(), 0)
        os.fsync(file.fileno())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, ours: Holder) -> Iterator[BinaryIO]:
    """The file, held by the kernel's lock, which ends with the process; raises `HeldError`."""
    end = time.monotonic() + ORPHANS_END_S
    while True:
        with path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(file.fileno())
                ending = holder and (holder.is_of(ours.job) or not holder.runs())  # it, or its children
                if ending and time.monotonic() < end:
                    time.sleep(0.1)
                    continue
                who = "another process" if holder is None else f"process {holder.pid} of machine {holder.host}"
                raise HeldError(f"{who} is working here; wait for it") from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                holder = _holder(file.fileno())  # a file system without locks: what stands in the file has to do
                if holder and holder[:2] != ours[:2] and holder.host == ours.host and holder.runs():
                    raise HeldError(f"process {holder.pid} of this machine is working here; wait for it") from None
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                yield file
                return
        # Whoever held it has just deleted it.


def _holder(descriptor: int) -> Holder | None:
    """Who stands in a lock file; None in one that nobody holds."""
    match os.pread(descriptor, 1000, 0).decode(errors="replace").split():
        case [host, pid, *job] if pid.isdecimal():
            return Holder(host, int(pid), " ".join(job))
    return None
