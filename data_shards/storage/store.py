"""What every place of files has in common: whole small files, and spans of bytes of large ones."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import pydantic.dataclasses
from pydantic import ConfigDict, Field

from mixcl_dist.data_shards.errors import DataError

_MAX_GAP = 1 << 16
"""Bytes read and thrown away rather than asked around: tar headers and small members lie between payloads."""
_MAX_BLOCK = 1 << 23
"""Bytes beyond which neighbouring spans are read apart, side by side and with less to repeat after a failure."""


class StorageError(DataError):
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


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True))
class CacheConfig:
    """Where spans of a remote store are kept on local disk, for all processes of the machine together."""

    folder: Path
    """Folder on a local disk."""
    max_bytes: Annotated[int, Field(ge=1, lt=2**63, strict=True)]
    """Of everything kept in `folder`; what was not used for longest goes first."""


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
            what = f"ends before byte {span.end}, cut off or replaced"
            return StorageError(f"{self.path(span.file)}: {what}; copy it again")
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
