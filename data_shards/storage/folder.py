"""Files in a local folder, or one that is mounted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from mixcl_dist.data_shards.storage.store import Block, MissingError, Span, StorageError, Store

_OPEN_FILES = 64


class FolderStore(Store):
    """Files in a local folder, or one that is mounted."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._prefix = folder, os.path.join(folder, "")
        self._open = lru_cache(_OPEN_FILES)(_OpenFile)

    def __reduce__(self) -> tuple[type[FolderStore], tuple[Path]]:
        return FolderStore, (self._folder,)

    def path(self, name: str) -> str:
        return self._prefix + name

    def read(self, name: str) -> bytes:
        if problem := self._unsafe(name):
            raise problem
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise self._failure(name, error) from None

    def forget(self, span: Span) -> None:
        """Nothing is kept here."""

    def _read_blocks(self, blocks: Sequence[Block]) -> Iterator[bytes | StorageError]:
        for block in blocks:
            try:
                yield self._read_block(block)
            except OSError as error:
                yield self._failure(block.file, error)

    def _read_block(self, block: Block) -> bytes:
        path = self.path(block.file)  # as text: to take a `Path` apart costs as much as a small read
        # Asked each time: a file that took the place of an open one has another inode and is opened itself, and
        # memory is taken for no more than the file holds.
        found = os.stat(path)
        file = self._open(path, found.st_dev, found.st_ino)
        return file.read(block.start, min(block.end, found.st_size))

    def _failure(self, name: str, error: OSError) -> StorageError:
        if isinstance(error, FileNotFoundError):
            return MissingError(f"{self.path(name)}: is missing")
        return StorageError(f"{self.path(name)}: {error.strerror or 'cannot be read'}")


class _OpenFile:
    """A descriptor that is closed with its last use, so also when another thread pushes it out of the cache."""

    def __init__(self, path: str, device: int, inode: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, fewer at the end of the file; a single read is short at signals and beyond 2 GiB."""
        content = b""
        while len(content) < end - start:
            more = os.pread(self._descriptor, end - start - len(content), start + len(content))
            if not more:
                break
            content = content + more if content else more
        return content

    def __del__(self) -> None:
        if descriptor := getattr(self, "_descriptor", None):
            os.close(descriptor)
