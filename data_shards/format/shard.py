"""One shard: a plain USTAR file that WebDataset reads, and beside it an index that knows every byte's digest.

A sample is a key and its members, stored next to each other as `{key}.{member}`.

Of shards that came from elsewhere this is promised: nothing in them is executed, no size in an index, manifest, table
or payload is believed before it is checked, no link or path in a tar is followed, and what has been damaged by accident
is never given out. Digests are no signature: whoever changes voxels and every digest with them is not found out.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple

import xxhash
from pydantic import Field, TypeAdapter, ValidationError

from mixcl_dist.data_shards.errors import DataError
from mixcl_dist.data_shards.format.codec import digest
from mixcl_dist.data_shards.storage.publishing import publish

INDEX_VERSION = 1
ANEW = "remove the folder and build the shards again"
"""The cure of damage: a build leaves alone what it finds finished."""
_KEY = r"[A-Za-z0-9_-]+"
"""For WebDataset a dot begins the member, a slash a folder."""
_Key = Annotated[str, Field(pattern=f"^{_KEY}$")]
_MemberName = Annotated[str, Field(pattern=r"^[a-z0-9]+(\.[a-z0-9]+)*$")]
_CHUNK = 1 << 20


class ShardError(DataError):
    """A shard or sample that is not what was written; the message is one line that names it."""


class Member(NamedTuple):
    """Where one member's payload lies in the tar file."""

    offset: Annotated[int, Field(ge=tarfile.BLOCKSIZE)]
    size: Annotated[int, Field(ge=0)]
    xxh3: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


@dataclass(frozen=True)
class ShardIndex:
    version: int
    bytes: int
    """Size of the tar file."""
    xxh3: str
    """Digest of the whole tar file."""
    samples: dict[_Key, dict[_MemberName, Member]]
    """Key → member → place, in the order of the file."""


_INDEX = TypeAdapter(ShardIndex)


def index_path(path: Path) -> Path:
    return path.with_suffix(".index.json")


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> ShardIndex:
    """Write `samples` to `path` and the index beside it; the same samples always give the same bytes.

    Raises `ValueError` for a key that has other characters than letters, digits, `_` and `-`, or that with its member
    exceeds USTAR's 100 characters.
    """
    whole, size = xxhash.xxh3_64(), 0
    places: dict[str, dict[str, Member]] = {}
    with publish(path) as file:
        for block in _tar_blocks(samples, places):
            file.write(block)
            whole.update(block)
            size += len(block)
    index = ShardIndex(INDEX_VERSION, size, whole.hexdigest(), places)
    with publish(index_path(path)) as file:
        file.write(_INDEX.dump_json(index))
    return index


def read_index(path: Path) -> ShardIndex:
    """The index beside the shard `path`; raises `ShardError`."""
    beside = index_path(path)
    try:
        return parse_index(beside.read_bytes(), beside)
    except FileNotFoundError:
        raise ShardError(f"{beside}: is missing; {ANEW}") from None


def parse_index(content: bytes, where: Path | str) -> ShardIndex:
    """The index that `content`, read from `where`, holds; raises `ShardError`."""
    try:
        index = _INDEX.validate_json(content)
    except ValidationError:
        raise ShardError(f"{where}: is damaged; {ANEW}") from None
    if index.version > INDEX_VERSION:
        raise ShardError(f"{where}: has format {index.version}, newer than {INDEX_VERSION}; update mixcl-dist")
    places = (member for members in index.samples.values() for member in members.values())
    if any(member.offset + member.size > index.bytes for member in places):
        raise ShardError(f"{where}: names bytes beyond the shard's end; {ANEW}")
    return index


def read_sample(path: Path, key: str, members: Mapping[str, Member]) -> dict[str, bytes]:
    """One sample's payloads by the index; raises `ShardError` when one is damaged or lies beyond the file's end."""
    sample = {}
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for name, member in members.items():
            if member.offset + member.size > size:
                raise ShardError(f"{path}: is cut off before the end of {key}.{name}; {ANEW}")
            file.seek(member.offset)
            sample[name] = file.read(member.size)
    check_sample(path, key, sample, members)
    return sample


def check_sample(path: Path, key: str, sample: Mapping[str, bytes], members: Mapping[str, Member]) -> None:
    """Raise `ShardError` unless `sample` has all of `members` with the digests that were written."""
    for name, member in members.items():
        if name not in sample or digest(sample[name]) != member.xxh3:
            state = "is damaged" if name in sample else "is missing"
            raise ShardError(f"{path}: {key}.{name} {state}; see `mixcl shards verify`, {ANEW}")


def verify_shard(path: Path) -> list[str]:
    """Read a shard completely and list, one line each, what differs from its index; [] when nothing does.

    Headers must be exactly those that `write_shard` makes, so that no link or path passes.
    """
    try:
        index = read_index(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < index.bytes:
                return [f"{path}: is cut off, {size} of {index.bytes} bytes are there"]
            problems = list(_member_problems(path, file, index))
            if not problems and _file_digest(file) != (index.bytes, index.xxh3):
                problems = [f"{path}: differs from its index outside of the samples"]
    except FileNotFoundError:
        return [f"{path}: is missing"]
    except (ShardError, OSError) as error:
        return [str(error)]
    return problems


def _member_problems(path: Path, file: BinaryIO, index: ShardIndex) -> Iterator[str]:
    for key, members in index.samples.items():
        for name, member in members.items():
            file.seek(max(0, member.offset - tarfile.BLOCKSIZE))
            header = file.read(tarfile.BLOCKSIZE)
            payload = file.read(member.size)
            if header != _tar_header(f"{key}.{name}", member.size):
                yield f"{path}: {key}.{name} has a damaged header"
            elif digest(payload) != member.xxh3:
                yield f"{path}: {key}.{name} is damaged"


def _file_digest(file: BinaryIO) -> tuple[int, str]:
    whole, size = xxhash.xxh3_64(), 0
    file.seek(0)
    while chunk := file.read(_CHUNK):
        whole.update(chunk)
        size += len(chunk)
    return size, whole.hexdigest()


def _tar_blocks(
    samples: Iterable[tuple[str, Mapping[str, bytes]]], places: dict[str, dict[str, Member]]
) -> Iterator[bytes]:
    """The tar file piece by piece; fills `places` on the way."""
    position = 0
    for key, members in samples:
        if not re.fullmatch(_KEY, key) or key in places:
            raise ValueError(f"sample key {key!r} is empty, repeated, or has a dot, slash or other such character")
        places[key] = {}
        for name, payload in members.items():
            padding = -len(payload) % tarfile.BLOCKSIZE
            position += tarfile.BLOCKSIZE
            places[key][name] = Member(position, len(payload), digest(payload))
            position += len(payload) + padding
            yield _tar_header(f"{key}.{name}", len(payload))
            yield payload
            yield bytes(padding)
    end = 2 * tarfile.BLOCKSIZE
    yield bytes(end + -(position + end) % tarfile.RECORDSIZE)


def _tar_header(name: str, size: int) -> bytes:
    """512 bytes without owner, time or anything else that two builds could differ in."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT, encoding="ascii")
