"""Checkpoints that are published whole or not at all, and verified before they are trusted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SEAL = "checkpoint.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing or broken; the message is one line with the cure."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 200
    """Steps between checkpoints; one is always made at the end."""
    keep: int = 2
    """Newest checkpoints kept; older ones are removed."""


@contextmanager
def publish(
    folder: Path,
    step: int,
    *,
    keep: int,
    state: dict,
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Give a temporary folder for every rank to write into; when the block ends, seal it and rename it.

    `state` (JSON values) and the digest of every file go into the seal, which is written last. A reader never sees
    an unfinished checkpoint: the final name appears with everything in it and on disk.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    yield temporary
    barrier()
    if rank == 0:
        _seal(temporary, state)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(folder)
        for old in _sealed(folder)[:-keep]:
            shutil.rmtree(old)
    barrier()


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose every file has the digest in its seal; broken ones are passed over."""
    return next((path for path in reversed(_sealed(folder)) if not verify(path)), None)


def read_state(checkpoint: Path) -> dict:
    """The `state` that was given to `publish`."""
    return json.loads((checkpoint / SEAL).read_text())["state"]


def verify(checkpoint: Path) -> list[str]:
    """Problems of a sealed checkpoint, one line each; empty when it is whole."""
    try:
        files = json.loads((checkpoint / SEAL).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{checkpoint}: seal cannot be read: {error}"]
    problems = []
    for name, digest in files.items():
        path = checkpoint / name
        if not path.exists():
            problems.append(f"{path}: missing")
        elif _digest(path) != digest:
            problems.append(f"{path}: content differs from its digest")
    return problems


def _seal(folder: Path, state: dict) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    digests = {str(path.relative_to(folder)): _digest(path) for path in files}
    seal = folder / SEAL
    seal.write_text(json.dumps({"state": state, "files": digests}, indent=1))
    _sync(seal)
    _sync(folder)


def _sealed(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"step_*/{SEAL}"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
