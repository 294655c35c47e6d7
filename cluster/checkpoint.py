"""Checkpoints that are published whole or not at all, and verified before they are trusted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import pydantic.dataclasses
from pydantic import ConfigDict, Field

from mixcl_dist.cluster.errors import ClusterError

SEAL = "checkpoint.json"


class CheckpointError(ClusterError):
    """A checkpoint that is missing or broken; the message is one line with the cure."""


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True))
class CheckpointConfig:
    """When a run is saved so that it can go on."""

    every: Annotated[int, Field(ge=1, le=10**8, strict=True)] = 200
    """Steps between checkpoints; one is always made at the end."""
    keep: Annotated[int, Field(ge=1, le=10**6, strict=True)] = 2
    """Newest whole checkpoints kept; once there are so many, all others are removed."""


class Writer:
    """Writes the checkpoints in `folder` beside whatever else its process does, one at a time.

    For the one process that writes there. What a killed one left half written is removed.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        for left in folder.glob(".step_*.tmp"):
            shutil.rmtree(left, ignore_errors=True)

    def begin(self, step: int, *, state: dict, write: Callable[[Path], None], size: int) -> None:
        """Let `write` fill a folder with `size` bytes, and `publish` it, after the one before; does not wait for it.

        What `write` reads must stay as it is until `wait` returns.
        """
        self.wait()
        self._writing = self._executor.submit(self._write, step, state, write, size)

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise at once."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Until the newest checkpoint is published; raises `CheckpointError` where it could not be."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Let the newest checkpoint be published, if it can be."""
        self._executor.shutdown()

    def _write(self, step: int, state: dict, write: Callable[[Path], None], size: int) -> None:
        try:
            with publish(self._folder, step, keep=self._keep, state=state) as folder:
                write(folder)
        except OSError as error:
            free = shutil.disk_usage(self._folder if self._folder.exists() else self._folder.parent).free
            raise CheckpointError(
                f"{self._folder}: step {step} could not be saved, which needs {size:,} bytes ({free:,} are free): "
                f"{error.strerror or error}; make room there, then go on with --resume latest"
            ) from None


@contextmanager
def publish(folder: Path, step: int, *, keep: int, state: dict) -> Iterator[Path]:
    """Give a temporary folder to write into; when the block ends, seal it and rename it.

    `state` (JSON values) and the digest of every file go into the seal, which is written last. A reader never sees
    an unfinished checkpoint: the final name appears with everything in it and on disk. Where the block raises, nothing
    is left of it.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _seal(temporary, state)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(folder)
    _retain(folder, keep)


def newest(folder: Path, warn: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest checkpoint whose every file has the digest in its seal; None where there is no checkpoint at all.

    Newer ones that are not whole are passed over, each told to `warn` in one line. Raises `CheckpointError` where
    there are checkpoints and none is whole: to begin again from nothing is for a person to decide.
    """
    found = _published(folder)
    for path in found:
        problems = verify(path)
        if not problems:
            return path
        warn(f"{problems[0]}; checkpoint {path.name} is passed over")
    if found:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{folder}: no checkpoint is whole ({names}); to begin at step 0, move this folder away")
    return None


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints made at `step` or later, so that no run goes on from them; nothing is deleted."""
    for path in _published(folder):
        if int(path.name.removeprefix("step_")) >= step:
            aside = path.with_name(f"diverged_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def read_state(checkpoint: Path) -> dict:
    """The `state` that was given to `publish`."""
    return json.loads((checkpoint / SEAL).read_text())["state"]


def verify(checkpoint: Path) -> list[str]:
    """Problems of a published checkpoint, one line each; empty when it is whole."""
    try:
        seal = json.loads((checkpoint / SEAL).read_text())
        files = seal["files"]
        if not all(isinstance(part, dict) for part in (files, seal["state"])):
            raise TypeError("is no seal")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"{checkpoint / SEAL}: cannot be read ({' '.join(str(error).split())})"]
    present = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()} - {SEAL}
    problems = [f"{checkpoint / name}: missing" for name in sorted(files.keys() - present)]
    problems += [f"{checkpoint / name}: not in the seal" for name in sorted(present - files.keys())]
    differing = [name for name in sorted(files.keys() & present) if _digest(checkpoint / name) != files[name]]
    return problems + [f"{checkpoint / name}: content differs from its digest" for name in differing]


def _seal(folder: Path, state: dict) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    digests = {str(path.relative_to(folder)): _digest(path) for path in files}
    seal = folder / SEAL
    seal.write_text(json.dumps({"state": state, "files": digests}, indent=1))
    _sync(seal)
    _sync(folder)


def _retain(folder: Path, keep: int) -> None:
    """Keep the newest `keep` whole checkpoints; before there are so many, nothing is removed, broken ones neither."""
    whole: list[Path] = []
    others: list[Path] = []
    for path in _published(folder):
        (others if len(whole) == keep or verify(path) else whole).append(path)
    if len(whole) == keep:
        for path in others:
            shutil.rmtree(path)


def _published(folder: Path) -> list[Path]:
    """Checkpoints under their final names, whole or not, the newest first."""
    steps = {path: path.name.removeprefix("step_") for path in folder.glob("step_*") if path.is_dir()}
    numbered = {path: int(number) for path, number in steps.items() if number.isdecimal()}
    return sorted(numbered, key=numbered.__getitem__, reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
