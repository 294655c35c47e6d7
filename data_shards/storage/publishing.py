"""Files that appear whole or not at all, and a lock that one process holds."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


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


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; raises `BlockingIOError` when another process holds it."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
