"""Samples by number → arrays: found by the index, read in few requests, checked against their digests, decoded."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mixcl_dist.data_shards.format.codec import decode_into, digest
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.data_shards.format.shard import ANEW, Member, ShardError, parse_index
from mixcl_dist.data_shards.storage.store import Span, StorageError, Store, UnreachableError
from mixcl_dist.data_shards.streaming.order import WINDOW_SHARDS

MAX_GAP = 1 << 16
"""Bytes that may lie between two members of a sample; there are only headers and `.json` between them."""


class Wanted(NamedTuple):
    """One row of a batch that is to be filled."""

    row: int
    slot: int
    attempt: int
    """0 for the slot's own sample, n for its n-th replacement."""
    sample: int
    """Number of the sample, counted through all shards."""
    label: bool
    """Whether its label is to be read; else the label is 0."""


class RowRead(NamedTuple):
    """What became of a row."""

    wanted: Wanted
    key: str
    """Empty where the sample's name could not be read."""
    shard: str
    cause: str | None
    """Why the row was not filled, in one line; None where it was."""
    unreachable: bool = False
    """Whether the bytes may well be there, but could not be had now."""


class SampleReader:
    """Reads samples of one set of shards; each worker process has its own.

    `label_numbers` (256,) uint8 says what each stored label is read as; None leaves them as they are.
    """

    def __init__(self, store: Store, manifest: Manifest, label_numbers: np.ndarray | None = None) -> None:
        self._store = store
        self._label_numbers = label_numbers
        self._voxels = math.prod(manifest.patch_size)
        # Only what is needed of the manifest: this object is sent to every worker.
        self._files = [shard.file for shard in manifest.shards]
        self._bytes = [shard.bytes for shard in manifest.shards]
        self._index_digests = [shard.index_xxh3 for shard in manifest.shards]
        self._first_of_shard = manifest.first_of_shard.tolist()  # quicker than NumPy to search for one number

    def read(self, wanted: Sequence[Wanted], image: np.ndarray, label: np.ndarray | None) -> list[RowRead]:
        """Fill the rows of `image`, (rows, X, Y, Z) int16, and `label`, the same in uint8, that are wanted.

        `label` None reads no labels. What cannot be read says so in its outcome, and its row holds anything.
        """
        places = [self._place(one) for one in wanted]
        found = [place for place in places if isinstance(place, _Place)]
        payloads = iter(self._store.read_spans([place.span for place in found]))
        outcomes = []
        for one, place in zip(wanted, places, strict=True):
            if isinstance(place, RowRead):
                outcomes.append(place)
            else:
                row_label = None if label is None else label[one.row]
                outcomes.append(self._fill(one, place, next(payloads), image[one.row], row_label))
        return outcomes

    def _place(self, one: Wanted) -> _Place | RowRead:
        shard = bisect_right(self._first_of_shard, one.sample) - 1
        file = self._files[shard]
        try:
            key, members = self._index(shard)[one.sample - self._first_of_shard[shard]]
            return _Place.of(file, key, members, one.label, self._voxels, self._bytes[shard])
        except (ShardError, StorageError) as error:
            return RowRead(one, "", file, str(error), isinstance(error, UnreachableError))

    @lru_cache(maxsize=3 * WINDOW_SHARDS)  # noqa: B019 - a reader lives as long as its process
    def _index(self, shard: int) -> list[tuple[str, dict[str, Member]]]:
        name = self._files[shard].removesuffix(".tar") + ".index.json"
        content, where = self._store.read(name), self._store.path(name)
        if digest(content) != self._index_digests[shard]:
            raise ShardError(f"{where}: is not the index that the manifest names; {ANEW}")
        samples = list(parse_index(content, where).samples.items())
        if len(samples) != self._first_of_shard[shard + 1] - self._first_of_shard[shard]:
            raise ShardError(f"{where}: has {len(samples)} samples, unlike the manifest; {ANEW}")
        return samples

    def _fill(
        self,
        one: Wanted,
        place: _Place,
        content: memoryview | StorageError,
        image: np.ndarray,
        label: np.ndarray | None,
    ) -> RowRead:
        """Decode one sample into its row."""
        cause = None if isinstance(content, StorageError) else place.decode(content, image, label)
        if cause:  # read once more, past a cache: the bytes may have been damaged on their way
            self._store.forget(place.span)
            (content,) = self._store.read_spans([place.span])
            cause = None if isinstance(content, StorageError) else place.decode(content, image, label)
        if isinstance(content, StorageError):
            return RowRead(one, place.key, place.span.file, str(content), isinstance(content, UnreachableError))
        if label is not None and self._label_numbers is not None and not cause:
            label[...] = self._label_numbers[label]
        return RowRead(one, place.key, place.span.file, cause)


class _Place(NamedTuple):
    """Where the payloads of a sample lie."""

    key: str
    span: Span
    image: tuple[str, Member]
    label: tuple[str, Member] | None

    @classmethod
    def of(
        cls, file: str, key: str, members: Mapping[str, Member], label: bool, voxels: int, shard_bytes: int
    ) -> _Place:
        """Raises `ShardError` for an index whose sizes no such sample can have, before anything of them is read."""
        image = _only("ct.", members)
        if image is None:
            raise ShardError(f"{file}: {key} has no image; {ANEW}")
        chosen = _only("seg.", members) if label else None
        parts = [image[1]] + ([chosen[1]] if chosen else [])
        begin, end = min(part.offset for part in parts), max(part.offset + part.size for part in parts)
        stored = sum(part.size for part in parts)
        if not (
            0 < stored <= 4 * voxels + MAX_GAP and end - begin <= stored + MAX_GAP and 0 <= begin < end <= shard_bytes
        ):
            raise ShardError(f"{file}: {key} has impossible sizes in the index; {ANEW}")
        return cls(key, Span(file, begin, end), image, chosen)

    def decode(self, content: memoryview, image: np.ndarray, label: np.ndarray | None) -> str | None:
        """Fill a row; returns why that failed."""
        for place, out in ((self.image, image), (self.label, label)):
            if place is None or out is None:
                continue
            name, member = place
            payload = content[member.offset - self.span.start :][: member.size]
            if digest(payload) != member.xxh3:
                return f"{self.key}.{name} is damaged"
            try:
                decode_into(name, payload, out)
            except ValueError as error:
                return f"{self.key}.{name}: {error}"
        if self.label is None and label is not None:
            label[...] = 0
        return None


def _only(prefix: str, members: Mapping[str, Member]) -> tuple[str, Member] | None:
    return next((item for item in members.items() if item[0].startswith(prefix)), None)
