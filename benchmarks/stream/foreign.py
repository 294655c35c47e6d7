"""litdata and mosaicml-streaming holding the same samples; runs in the environment that `environment.sh` makes.

    foreign.py SHARDS DATA        writes the samples of the tar files in SHARDS in both formats below DATA

Each comes twice: with the blosc2 payload of our shards, decoded by the user's code in the worker, and with the array as
the library itself stores it. Neither verifies what it reads from a local disk. Both are read in place, shuffled, by the
loader that their documentation shows, with batches made in the workers.
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
import torch
from torch.utils.data import DataLoader

try:
    import torchvision  # noqa: F401
except RuntimeError:  # beside a build of torch without CUDA, for want of two operators that nothing here calls
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import litdata
import streaming

SHAPE = (96, 96, 96)
MUCH = 200_000
"""Samples of an epoch that is never finished."""


def decode(payload: bytes) -> torch.Tensor:
    image = torch.empty((1, *SHAPE), dtype=torch.int16)
    blosc2.decompress2(payload, dst=image.numpy(), nthreads=1)
    return image


def decode_sample(sample: dict[str, Any]) -> dict[str, Any]:
    return {"image": decode(sample["image"]), "key": sample["key"]}


@dataclass
class LitData:
    data: Path
    batch_size: int
    workers: int

    folder = "litdata-array"
    transform = None

    def epoch(self) -> Iterator[torch.Tensor]:
        return (batch["image"] for batch in self._loader(self._dataset()))

    def endless(self) -> Iterator[torch.Tensor]:
        dataset = litdata.ParallelStreamingDataset([self._dataset()], length=float("inf"))
        return (batch[0]["image"] for batch in self._loader(dataset))

    def _dataset(self) -> litdata.StreamingDataset:
        return litdata.StreamingDataset(str(self.data / self.folder), shuffle=True, transform=self.transform)

    def _loader(self, dataset: Any) -> litdata.StreamingDataLoader:
        return litdata.StreamingDataLoader(dataset, batch_size=self.batch_size, num_workers=self.workers)


class LitDataBlosc(LitData):
    folder = "litdata-blosc2"
    transform = staticmethod(decode_sample)


class BloscMosaicDataset(streaming.StreamingDataset):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return decode_sample(super().__getitem__(index))


@dataclass
class Mosaic:
    data: Path
    batch_size: int
    workers: int

    dataset = streaming.StreamingDataset
    folder = "mosaic-array"

    def epoch(self) -> Iterator[torch.Tensor]:
        return self._batches()

    def endless(self) -> Iterator[torch.Tensor]:
        return self._batches(epoch_size=MUCH)

    def _batches(self, **settings: int) -> Iterator[torch.Tensor]:
        local = str(self.data / self.folder)
        dataset = self.dataset(local=local, batch_size=self.batch_size, shuffle=True, **settings)
        loader = DataLoader(dataset, batch_size=self.batch_size, num_workers=self.workers)
        return (batch["image"] for batch in loader)


class MosaicBlosc(Mosaic):
    dataset = BloscMosaicDataset
    folder = "mosaic-blosc2"


CONTESTANTS = {
    "litdata, blosc2": LitDataBlosc,
    "litdata, array": LitData,
    "mosaicml-streaming, blosc2": MosaicBlosc,
    "mosaicml-streaming, array": Mosaic,
}


def payloads(shards: Path) -> Iterator[tuple[str, bytes]]:
    """Key and blosc2 payload of every sample, in the order of the shards."""
    for path in sorted(shards.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                if name == "ct.b2":
                    yield key, tar.extractfile(member).read()


def lit_samples(shards: str, array: bool) -> Iterator[dict[str, Any]]:
    for key, payload in payloads(Path(shards)):
        yield {"image": decode(payload).numpy() if array else payload, "key": key}


def prepare(shards: Path, data: Path) -> None:
    for kind, array in (("blosc2", False), ("array", True)):
        litdata.optimize(
            partial(lit_samples, array=array),
            [str(shards)],
            output_dir=str(data / f"litdata-{kind}"),
            chunk_bytes="64MB",
            num_workers=1,
            start_method="fork",
            verbose=False,
        )
        column = f"ndarray:int16:1,{','.join(map(str, SHAPE))}" if array else "bytes"
        folder = str(data / f"mosaic-{kind}")
        with streaming.MDSWriter(out=folder, columns={"image": column, "key": "str"}, size_limit="64mb") as writer:
            for key, payload in payloads(shards):
                writer.write({"image": decode(payload).numpy() if array else payload, "key": key})


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), Path(sys.argv[2]))
