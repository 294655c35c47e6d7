"""What is compared, as far as it runs in the project's own environment; each streams the same samples of a corpus.

A contestant has `epoch()`, every sample once, and `endless()`, what is timed: batches of images (B, 1, X, Y, Z) or
(B, X, Y, Z) int16 in the trainer's process, or for what makes no batches numbers of samples that are done.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import blosc2
import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader, Dataset, default_collate

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mixcl_dist.data_shards.format.codec import decode_into, digest
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.data_shards.format.shard import Member, read_index
from mixcl_dist.data_shards.streaming.stream import PatchStream

SHAPE = (96, 96, 96)
MEMBER = "ct.b2"
POLL_SECONDS = 0.005
SHUFFLE_BUFFER = 64
BATCHES_IN_MEMORY = 4
"""Of the stream at both sizes: two under way and two that the trainer may hold."""


@dataclass
class Contestant:
    data: Path
    batch_size: int
    workers: int

    @property
    def shards(self) -> Path:
        return self.data / "shards"


class Ours(Contestant):
    """Index, pread and decoding into a shared ring; verifies every payload."""

    def endless(self) -> Iterator[torch.Tensor]:
        stream = PatchStream(self.shards, batch_size=self.batch_size, seed=0, workers=self.workers, label_cases=set())
        return (batch.image for batch in stream)

    def epoch(self) -> Iterator[torch.Tensor]:
        left = Manifest.load(self.shards).patches
        for images in self.endless():
            yield images[:left]
            left -= len(images)
            if left <= 0:
                return


def decode_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """As a user would write it: straight into the memory of a tensor, by one thread, unverified."""
    image = torch.empty((1, *SHAPE), dtype=torch.int16)
    blosc2.decompress2(sample[MEMBER], dst=image.numpy(), nthreads=1)
    return {"image": image, "key": sample["__key__"]}


def npz_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """What webdataset's own decoder made of an npz file."""
    return {"image": torch.from_numpy(sample["npz"]["image"])[None], "key": sample["__key__"]}


def numpy_sample(sample: dict[str, Any]) -> tuple[np.ndarray, str]:
    return decode_sample(sample)["image"].numpy(), sample["__key__"]


def decode_batch(samples: list[dict[str, Any]], shared: bool) -> dict[str, Any]:
    """Decode straight into the batch, which saves a copy."""
    images = torch.empty((len(samples), 1, *SHAPE), dtype=torch.int16)
    if shared:
        images.share_memory_()
    for image, sample in zip(images, samples, strict=True):
        blosc2.decompress2(sample[MEMBER], dst=image.numpy(), nthreads=1)
    return {"image": images, "key": [sample["__key__"] for sample in samples]}


class WebDataset(Contestant):
    """webdataset by its documentation: shards split between workers, decoded and batched in the worker, WebLoader.

    `default_collate` stacks the tensors of a worker straight into shared memory; webdataset's own collation would make
    arrays, which travel through a pipe.
    """

    folder: ClassVar = "shards"
    decode: ClassVar[Callable[[Any], Any]] = staticmethod(decode_sample)
    collate: ClassVar[Callable[[list[Any]], Any]] = staticmethod(default_collate)
    own_decoder: ClassVar = False
    batched_by_loader: ClassVar = False
    shuffle: ClassVar = 0
    prefetch: ClassVar = 2

    def epoch(self) -> Iterator[torch.Tensor]:
        return self._batches(self._samples())

    def endless(self) -> Iterator[torch.Tensor]:
        return self._batches(self._samples().repeat())

    def _samples(self) -> wds.WebDataset:
        shards = sorted(str(path) for path in (self.data / self.folder).glob("shard-*.tar"))
        return wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False)

    def _batches(self, samples: wds.WebDataset) -> Iterator[torch.Tensor]:
        if self.shuffle:
            samples = samples.shuffle(self.shuffle)
        if self.own_decoder:
            samples = samples.decode()
        samples = samples.map(self.decode)
        settings: dict[str, Any] = {"num_workers": self.workers, "prefetch_factor": self.prefetch}
        if self.batched_by_loader:
            loader = DataLoader(samples, batch_size=self.batch_size, collate_fn=self.collate, **settings)
        else:
            samples = samples.batched(self.batch_size, collation_fn=self.collate)
            loader = wds.WebLoader(samples, batch_size=None, **settings)
        for batch in loader:
            images = batch["image"] if isinstance(batch, dict) else batch[0]
            yield torch.as_tensor(images)


class WebDatasetNpz(WebDataset):
    """The same with `np.savez_compressed` payloads and webdataset's own decoder for them."""

    folder = "npz"
    decode = staticmethod(npz_sample)
    own_decoder = True


def identity(sample: Any) -> Any:
    return sample


class OwnCollation(WebDataset):
    decode = staticmethod(numpy_sample)
    collate = staticmethod(wds.filters.default_collation_fn)


class IntoBatch(WebDataset):
    decode = staticmethod(identity)
    collate = staticmethod(partial(decode_batch, shared=False))


class IntoSharedBatch(WebDataset):
    decode = staticmethod(identity)
    collate = staticmethod(partial(decode_batch, shared=True))


class Shuffled(WebDataset):
    shuffle = SHUFFLE_BUFFER


class MorePrefetch(WebDataset):
    prefetch = 4


class BatchedByLoader(WebDataset):
    batched_by_loader = True


class ByIndex(Contestant):
    """What a careful user writes without webdataset: a map-style data set, index and pread, in a plain DataLoader."""

    def epoch(self) -> Iterator[torch.Tensor]:
        loader = DataLoader(
            _Indexed(samples(self.shards)), batch_size=self.batch_size, shuffle=True, num_workers=self.workers
        )
        return (batch["image"] for batch in loader)

    def endless(self) -> Iterator[torch.Tensor]:
        data = _Indexed(samples(self.shards))
        order = torch.utils.data.RandomSampler(data, replacement=True, num_samples=10_000_000)
        loader = DataLoader(data, batch_size=self.batch_size, sampler=order, num_workers=self.workers)
        return (batch["image"] for batch in loader)


class _Indexed(Dataset):
    def __init__(self, places: list[tuple[Path, str, Member]]) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> dict[str, Any]:
        path, key, member = self._places[number]
        with path.open("rb", buffering=0) as file:
            payload = os.pread(file.fileno(), member.size, member.offset)
        return decode_sample({MEMBER: payload, "__key__": key})


def samples(shards: Path) -> list[tuple[Path, str, Member]]:
    """Shard, key and place of the payload of every sample."""
    paths = (shards / shard.file for shard in Manifest.load(shards).shards)
    return [(path, key, members[MEMBER]) for path in paths for key, members in read_index(path).samples.items()]


class Decoding(Contestant):
    """Decoding alone: pread from the page cache, digest and `decode_into` one array again and again, in N processes."""

    @property
    def arrays(self) -> int:
        """That a process fills in turn."""
        return 1

    def epoch(self) -> Iterator[torch.Tensor]:
        image = np.empty((1, *SHAPE), np.int16)
        for _ in _decode(samples(self.shards), image):
            yield torch.from_numpy(image)

    def endless(self) -> Iterator[int]:
        context = multiprocessing.get_context("spawn")
        done = context.Array("q", self.workers, lock=False)
        processes = [
            context.Process(target=_decode_for_ever, args=(self.shards, done, number, self.arrays), daemon=True)
            for number in range(self.workers)
        ]
        for process in processes:
            process.start()
        before = 0
        try:
            while True:
                while sum(done) - before < self.batch_size:
                    time.sleep(POLL_SECONDS)
                yield (now := sum(done)) - before
                before = now
        finally:
            for process in processes:
                process.kill()


class DecodingIntoBatches(Decoding):
    """The same into as many arrays as batches are made of, which no core's cache holds."""

    @property
    def arrays(self) -> int:
        return -(-BATCHES_IN_MEMORY * self.batch_size // self.workers)


def _decode(places: Iterable[tuple[Path, str, Member]], images: np.ndarray) -> Iterator[None]:
    files: dict[Path, int] = {}
    for image, (path, key, member) in zip(cycle(images), places, strict=False):
        if path not in files:
            files[path] = os.open(path, os.O_RDONLY)
        payload = os.pread(files[path], member.size, member.offset)
        if digest(payload) != member.xxh3:
            raise ValueError(f"{path}: {key} is damaged")
        decode_into(MEMBER, payload, image)
        yield


def _decode_for_ever(shards: Path, done: Any, number: int, arrays: int) -> None:
    everything = samples(shards)
    first = number * len(everything) // len(done)
    images = np.empty((arrays, *SHAPE), np.int16)
    for _ in _decode(cycle(everything[first:] + everything[:first]), images):
        done[number] += 1


CONTESTANTS = {
    "PatchStream": Ours,
    "decoding alone": Decoding,
    "decoding into batches": DecodingIntoBatches,
    "webdataset, blosc2": WebDataset,
    "webdataset, blosc2, into the batch": IntoSharedBatch,
    "webdataset, npz": WebDatasetNpz,
    "DataLoader by index": ByIndex,
    "webdataset's own collation": OwnCollation,
    "into the batch, not shared": IntoBatch,
    f"shuffle buffer of {SHUFFLE_BUFFER}": Shuffled,
    "prefetch_factor 4": MorePrefetch,
    "batched by the DataLoader": BatchedByLoader,
}
