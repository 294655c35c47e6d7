"""Where files lie and how they come there: whole or not at all; read by spans of bytes from a folder or a URL."""

from __future__ import annotations

import fcntl
import importlib
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

_MAX_GAP = 1 << 16
"""Bytes read and thrown away rather than asked around: tar headers and small members lie between payloads."""
_MAX_BLOCK = 1 << 23
"""Bytes beyond which neighbouring spans are read apart, side by side and with less to repeat after a failure."""
_OPEN_FILES = 64
_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}


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


class StorageError(ValueError):
    """Bytes that cannot be had; the message is one line that names the file, without credentials."""


class MissingError(StorageError):
    """There is no such file."""


class UnreachableError(StorageError):
    """The server refused, or all attempts failed on the way: unlike with other errors, the bytes may well be there."""


class Span(NamedTuple):
    """Bytes `start` to before `end` of one file of a store."""

    file: str
    start: int
    end: int


@dataclass(frozen=True)
class CacheConfig:
    """Where spans of a remote store are kept on local disk, for all processes of the machine together."""

    folder: Path
    max_bytes: int
    """Of everything kept in `folder`; what was not used for longest goes first."""

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"cache.max_bytes = {self.max_bytes} is out of range")


def open_store(url: str | Path, cache: CacheConfig | None = None) -> Store:
    """The store at a folder or a http, https, s3 or gs URL; nothing is read yet. A folder needs and uses no cache.

    Credentials, endpoints and proxies come from where aiohttp, s3fs and gcsfs find them: `~/.netrc`, `HTTPS_PROXY`;
    `AWS_*` and `~/.aws`; Google's default credentials; and fsspec's own configuration.

    Raises `StorageError` for another scheme, for a package that is not installed and for an unusable cache folder.
    """
    text = str(url)
    scheme, separator, _ = text.partition("://")
    if not separator:
        if re.match(rf"({'|'.join(_PACKAGES)}):/", text):
            raise StorageError(f"{text} lacks a slash after its scheme; give the URL as text, not as a path")
        return FolderStore(Path(url))
    if scheme not in _PACKAGES:
        known = "give a folder or a http, https, s3 or gs URL"
        raise StorageError(f"scheme {scheme} of {without_credentials(text)} is unknown; {known}")
    try:
        importlib.import_module(_PACKAGES[scheme])
    except ImportError:
        raise StorageError(f"{scheme}:// needs {_PACKAGES[scheme]}; pip install 'mixcl-dist[remote]'") from None
    # Imports aiohttp, which only that extra installs.
    from mixcl_dist.data_shards.remote import RemoteStore

    return RemoteStore(text, cache)


def without_credentials(url: str) -> str:
    """The URL without user, password and query, where signatures are passed."""
    scheme, _, rest = url.partition("://")
    host, slash, path = re.split("[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


class Store(ABC):
    """Where a set of files lies. May be sent to other processes, spawned or forked, and used by several threads."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole small file, never from a cache; raises `StorageError`, `MissingError` where there is none."""

    @abstractmethod
    def path(self, name: str) -> str:
        """Full path or URL for messages, without credentials."""

    @abstractmethod
    def forget(self, span: Span) -> None:
        """Drop what is kept of `span`, whose bytes proved damaged, so that the next read asks for them anew."""

    def read_spans(self, spans: Sequence[Span]) -> list[memoryview | StorageError]:
        """The bytes of every span, in order, or in its place why they cannot be had.

        Close spans of one file are read together and are views of one buffer, which lives as long as any of them.
        """
        results = [self._answer_at_once(span) for span in spans]
        blocks = _blocks(spans, [position for position, result in enumerate(results) if result is None])
        for block, content in zip(blocks, self._read_blocks(blocks), strict=True):
            for position in block.positions:
                results[position] = self._cut(block, content, spans[position])
        return [result for result in results if result is not None]

    @abstractmethod
    def _read_blocks(self, blocks: Sequence[Block]) -> Iterable[bytes | StorageError]:
        """Of each block its bytes, fewer where the file ends within it."""

    def _answer_at_once(self, span: Span) -> memoryview | StorageError | None:
        if problem := self._unsafe(span.file):
            return problem
        if not 0 <= span.start <= span.end:
            return StorageError(f"{self.path(span.file)}: cannot have bytes {span.start} to {span.end}")
        return memoryview(b"") if span.start == span.end else None

    def _unsafe(self, name: str) -> StorageError | None:
        """Names may come from a manifest that nobody vouches for."""
        if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
            return StorageError(f"{self.path('')}: {name!r} is not the name of a file in it")
        return None

    def _cut(self, block: Block, content: bytes | StorageError, span: Span) -> memoryview | StorageError:
        if isinstance(content, StorageError):
            return content
        if len(content) < span.end - block.start:
            return StorageError(f"{self.path(span.file)}: ends before byte {span.end}; it was cut off or replaced")
        return memoryview(content)[span.start - block.start : span.end - block.start]


@dataclass
class Block:
    """One read, and which of the spans that were asked for lie in it."""

    file: str
    start: int
    end: int
    positions: list[int] = field(default_factory=list)


def _blocks(spans: Sequence[Span], positions: Iterable[int]) -> list[Block]:
    """The reads that fetch the spans at `positions`, neighbours together."""
    blocks: list[Block] = []
    for position in sorted(positions, key=spans.__getitem__):
        file, start, end = spans[position]
        last = blocks[-1] if blocks else Block("", 0, 0)
        both_end = max(end, last.end)
        if last.file == file and start <= last.end + _MAX_GAP and both_end <= last.start + _MAX_BLOCK:
            last.end = both_end
            last.positions.append(position)
        else:
            blocks.append(Block(file, start, end, [position]))
    return blocks


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
