"""Shards → batches for one rank, endlessly, in an order that can be taken up again at any batch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.codec import decode, digest
from mixcl_dist.data_shards.manifest import Manifest, case_of
from mixcl_dist.data_shards.shard import Member, ShardError, check_sample, read_index


class StreamError(ValueError):
    """A stream that cannot be set up or continued as asked; the message is one line with the cure."""


@dataclass
class Batch:
    """B patches of X×Y×Z voxels, as they are stored."""

    image: torch.Tensor
    """(B, 1, X, Y, Z) int16, HU."""
    label: torch.Tensor
    """(B, X, Y, Z) uint8, the catalogue's classes; 0 everywhere where the case's label may not be used."""
    candidate_bits: torch.Tensor
    """(B, C + 1) int64: row b, column k is what a voxel of label k in patch b may be (`Catalogue.candidate_bits`)."""
    spacing: torch.Tensor
    """(B, 3) float32, mm."""
    keys: list[str]


class PatchStream:
    """Patches in batches of `batch_size` for this rank, over epochs without end.

    An epoch puts the shards in a random order and gives each worker of each rank an equal run of the samples in it,
    which the worker shuffles through a buffer of `shuffle_buffer` samples. What then does not fill a batch is left
    out until the next epoch's order. No sample comes twice in an epoch, on any rank, and all ranks' epochs have the
    same length. The order is a pure function of (manifest digest, selected cases, seed, epoch, batch_size, workers,
    shuffle_buffer, world_size); `workers` 0 reads in this process, in the order of one worker.

    `cases` are those whose patches come (None: all). Labels come of `label_cases` alone: another case's label is not
    even read, its voxels are 0 and may be anything.

    Raises `ManifestError` or `ShardError` for shards that are not whole, `StreamError` for a case that they do not
    hold and for fewer samples than one batch for every worker. While iterating, a damaged sample raises `ShardError`
    that names shard and key.
    """

    def __init__(
        self,
        shards: Path,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        label_cases: Collection[str],
        cases: Collection[str] | None = None,
        shuffle_buffer: int = 256,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        shards = Path(shards)
        manifest = Manifest.load(shards)
        if unknown := set(cases or ()) - {case.name for case in manifest.cases}:
            raise StreamError(f"{shards}: has no case {min(unknown)}; `mixcl shards inspect` lists what it holds")
        self._reader = _Reader(
            shards=shards,
            manifest=manifest,
            cases=None if cases is None else frozenset(cases),
            label_cases=frozenset(label_cases),
            batch_size=batch_size,
            seed=seed,
            workers=max(1, workers),
            shuffle_buffer=shuffle_buffer,
            rank=rank,
            world_size=world_size,
        )
        self._in_this_process = workers == 0
        self._consumed = 0
        self.batches_per_epoch = self._reader.batches * self._reader.workers
        if self.batches_per_epoch == 0:
            raise StreamError(
                f"{shards}: {sum(self._reader.samples)} samples do not fill one batch of {batch_size} for each of "
                f"{max(1, workers)} workers on {world_size} ranks; lower the batch size or data.workers"
            )

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `position()` on."""
        reader = dataclasses.replace(self._reader, first=self._consumed)
        workers = 0 if self._in_this_process else reader.workers
        # Its own generator: the loader would otherwise draw from, and so change, the caller's random numbers.
        loader = DataLoader(reader, batch_size=None, num_workers=workers, generator=torch.Generator())
        for batch in loader:
            if isinstance(batch, ShardError):
                raise batch
            self._consumed += 1
            yield batch

    def position(self) -> dict[str, int | str]:
        """Where the batches taken so far have led, and all that the order depends on; the same on every rank."""
        epoch, batch = divmod(self._consumed, self.batches_per_epoch)
        return {"epoch": epoch, "batch": batch} | self._reader.identity()

    def seek(self, position: Mapping[str, int | str]) -> None:
        """Make the next iteration begin at `position`; raises `StreamError` when this stream has another order."""
        for name, mine in self._reader.identity().items():
            if position.get(name) != mine:
                raise StreamError(
                    f"cannot continue the stream: {name} was {position.get(name)} and is {mine}; "
                    "go on with the same shards and settings, or start a new run"
                )
        self._consumed = int(position["epoch"]) * self.batches_per_epoch + int(position["batch"])


@dataclass(frozen=True, eq=False)
class _Reader(IterableDataset):
    """What one worker process of the loader runs: its share of every epoch, decoded into batches."""

    shards: Path
    manifest: Manifest
    cases: frozenset[str] | None
    label_cases: frozenset[str]
    batch_size: int
    seed: int
    workers: int
    shuffle_buffer: int
    rank: int
    world_size: int
    first: int = 0
    """Batches that all workers of this rank together have already given."""

    @cached_property
    def samples(self) -> tuple[int, ...]:
        """Samples of the selected cases in each shard."""
        if self.cases is None:
            return tuple(shard.samples for shard in self.manifest.shards)
        indices = (read_index(self.shards / shard.file).samples for shard in self.manifest.shards)
        return tuple(sum(case_of(key) in self.cases for key in index) for index in indices)

    @property
    def share(self) -> int:
        """Samples of an epoch for each worker of each rank."""
        return sum(self.samples) // (self.world_size * self.workers)

    @property
    def batches(self) -> int:
        """Batches of an epoch from each worker."""
        return self.share // self.batch_size

    def identity(self) -> dict[str, int | str]:
        """All that the order of samples depends on, beside the epoch."""
        selection = [None if self.cases is None else sorted(self.cases), sorted(self.label_cases)]
        return {
            "manifest": self.manifest.digest,
            "selection": digest(json.dumps(selection).encode()),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "workers": self.workers,
            "shuffle_buffer": self.shuffle_buffer,
            "world_size": self.world_size,
        }

    def __iter__(self) -> Iterator[Batch | ShardError]:
        """Endless batches; an error comes as an item, because raised here the loader would wrap it in a traceback.

        The loader takes from its processes in turn, beginning with the first: after `first` batches that one does
        the work of the worker whose turn it was.
        """
        info = get_worker_info()
        worker = ((info.id if info else 0) + self.first) % self.workers
        epoch, done = divmod(self.first, self.batches * self.workers)
        skipped = len(range(worker, done, self.workers))
        try:
            while True:
                yield from self._batches(epoch, worker, skipped)
                epoch, skipped = epoch + 1, 0
        except ShardError as error:
            yield error

    def _batches(self, epoch: int, worker: int, skipped: int) -> Iterator[Batch]:
        """This worker's batches of one epoch, after the first `skipped`, whose samples are not decoded."""
        reader = self.rank * self.workers + worker
        stream = itertools.chain.from_iterable(itertools.starmap(self._read, self._runs(epoch, reader)))
        rng = random.Random(f"{self.manifest.digest} {self.seed} {epoch} {reader}")
        shuffled = wds.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=rng)(stream)
        for number in range(self.batches):
            stored = list(itertools.islice(shuffled, self.batch_size))
            if number >= skipped:
                yield self._collate(stored)

    def _runs(self, epoch: int, reader: int) -> Iterator[tuple[str, int, int]]:
        """Shards, with first and end sample, that make up the share of `reader` in the order of `epoch`."""
        order = list(range(len(self.samples)))
        random.Random(f"{self.manifest.digest} {self.seed} {epoch}").shuffle(order)
        position, begin, end = 0, reader * self.share, (reader + 1) * self.share
        for shard in order:
            first, last = max(begin - position, 0), min(end - position, self.samples[shard])
            if first < last:
                yield self.manifest.shards[shard].file, first, last
            position += self.samples[shard]

    def _read(self, shard: str, first: int, end: int) -> Iterator[_Stored]:
        """Samples `first` to `end` of the selected ones in a shard, each checked against the index.

        webdataset ends in silence at a damaged header; here every sample that is in the index must come.
        """
        path = self.shards / shard
        index = read_index(path).samples
        expected = [key for key in index if self.cases is None or case_of(key) in self.cases][first:end]
        if len(expected) < end - first:
            raise ShardError(f"{path}: its index does not match the manifest; run `mixcl shards verify`")
        try:
            with path.open("rb") as file:
                members = tar_file_expander([{"url": shard, "stream": file}], select_files=self._is_wanted)
                samples = itertools.islice(group_by_keys(members), first, end)
                for key, sample in itertools.zip_longest(expected, samples):
                    wanted = {name: place for name, place in index[key].items() if self._is_wanted(f"{key}.{name}")}
                    if sample is None or sample["__key__"] != key or not wanted.keys() <= sample.keys():
                        raise ShardError(f"{path}: {key} is not whole; run `mixcl shards verify`")
                    yield _Stored(path, key, sample, wanted)
        except OSError as error:
            raise ShardError(f"{path}: {error.strerror or 'cannot be read'}; run `mixcl shards verify`") from error
        except tarfile.TarError as error:
            raise ShardError(f"{path}: is cut off or damaged; run `mixcl shards verify`") from error

    def _is_wanted(self, member: str) -> bool:
        key, _, name = member.partition(".")
        case = case_of(key)
        return (self.cases is None or case in self.cases) and (name != "seg.b2" or case in self.label_cases)

    def _collate(self, stored: Sequence[_Stored]) -> Batch:
        shape = self.manifest.patch_size
        images, labels, spacings = [], [], []
        for path, key, payloads, places in stored:
            check_sample(path, key, payloads, places)
            images.append(decode(payloads["ct.b2"], shape, np.int16))
            has_label = "seg.b2" in places
            labels.append(decode(payloads["seg.b2"], shape, np.uint8) if has_label else np.zeros(shape, np.uint8))
            spacings.append(json.loads(payloads["json"])["spacing_mm"])
        return Batch(
            image=torch.from_numpy(np.stack(images)[:, None]),
            label=torch.from_numpy(np.stack(labels)),
            candidate_bits=torch.from_numpy(np.stack([self._bits(case_of(s.key)) for s in stored])),
            spacing=torch.tensor(spacings, dtype=torch.float32),
            keys=[s.key for s in stored],
        )

    def _bits(self, case: str) -> np.ndarray:
        reliable = self._reliable[case] if case in self.label_cases else None
        return Catalogue(self.manifest.classes).candidate_bits(reliable)

    @cached_property
    def _reliable(self) -> dict[str, tuple[str, ...]]:
        return {case.name: case.reliable for case in self.manifest.cases}


class _Stored(NamedTuple):
    """A sample as it lies in its shard, with the members that the index promises."""

    path: Path
    key: str
    payloads: dict[str, bytes]
    places: dict[str, Member]
