"""Spans of remote files kept on local disk, bounded, for all processes of a machine together.

fsspec's filecache, blockcache and simplecache keep whole or growing files without a bound, and the records of two
processes that share one overwrite each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mixcl_dist.data_shards.storage.store import CacheConfig, StorageError

logger = logging.getLogger(__name__)

_DISK_BLOCK = 4096
_KEPT_FRACTION = 0.9
"""Of the bound, after making room: so that not every new span looks through the folder."""


class SpanCache:
    """Bytes by key, one file each, in a folder of its own below `config.folder`.

    The file `used` holds the sum of all sizes; whoever adds or evicts holds its lock. A process that is killed leaves
    the sum too high, never too low, until room is made the next time.
    """

    def __init__(self, config: CacheConfig) -> None:
        self._folder = config.folder / "mixcl-spans"
        self._max_bytes = config.max_bytes
        self._keeps = True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{config.folder}: cannot be made for the cache: {error.strerror}; give one that you may write"
            ) from None

    def get(self, key: str, size: int) -> memoryview | None:
        """The bytes kept under `key`, if they are `size`."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return memoryview(content) if len(content) == size else None

    def put(self, key: str, content: memoryview) -> None:
        """Keep a copy of `content`. A disk that takes no more ends that with one warning, and is no error."""
        needed = _on_disk(len(content))
        if not self._keeps or needed > self._max_bytes * _KEPT_FRACTION:
            return
        try:
            with self._locked_sum() as file:
                self._reserve(file, needed)
                self._write(self._path(key), content)
        except OSError as error:
            self._keeps = False
            logger.warning("%s: the cache keeps nothing more: %s", self._folder, error.strerror)

    def drop(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / name[:2] / name

    def _write(self, path: Path, content: memoryview) -> None:
        """Not `publish`: what a power failure spoils here is found by its digest, and waiting for the disk is dear."""
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @contextmanager
    def _locked_sum(self) -> Iterator[TextIO]:
        descriptor = os.open(self._folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _reserve(self, file: TextIO, size: int) -> None:
        text = file.read()
        used = int(text) if text.isdigit() else self._make_room(self._max_bytes)
        if used + size > self._max_bytes:
            used = self._make_room(int(self._max_bytes * _KEPT_FRACTION) - size)
        file.seek(0)
        file.truncate()
        file.write(str(used + size))
        file.flush()

    def _make_room(self, size: int) -> int:
        """Delete what was not used for longest until at most `size` bytes are kept; returns how many are."""
        kept = sorted(self._kept())
        total = sum(used for _, used, _ in kept)
        for _, used, path in kept:
            if total <= size:
                break
            path.unlink(missing_ok=True)
            total -= used
        return total

    def _kept(self) -> Iterator[tuple[int, int, Path]]:
        """When each file was used last, its bytes on disk, and where it is; also what killed writers left."""
        for path in self._folder.glob("??/*"):
            try:
                found = path.stat()
            except FileNotFoundError:  # another process has dropped it
                continue
            yield found.st_mtime_ns, _on_disk(found.st_size), path


def _on_disk(size: int) -> int:
    return -(-size // _DISK_BLOCK) * _DISK_BLOCK
