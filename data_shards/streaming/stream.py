"""Shards → batches for one rank, endlessly, in an order that can be taken up again at any step, by any number of ranks.

order.py     slot of the run → number of a sample
reader.py    number of a sample → decoded, in place
ring.py      worker processes that run readers, and the memory they share with the trainer
stream.py    joins them: batches as tensors, bad samples replaced, the position to go on from
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.format.codec import digest
from mixcl_dist.data_shards.format.manifest import CASES_FILE, CLASSES_FILE, CaseRecord, Manifest, case_of
from mixcl_dist.data_shards.format.shard import ANEW
from mixcl_dist.data_shards.storage import open_store
from mixcl_dist.data_shards.storage.store import CacheConfig, Store
from mixcl_dist.data_shards.streaming.order import Deck, Order
from mixcl_dist.data_shards.streaming.reader import RowRead, SampleReader, Wanted
from mixcl_dist.data_shards.streaming.ring import Filled, Ring, StreamError

__all__ = ["Batch", "Mixture", "PatchStream", "StreamError"]

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 100
"""Replacements of one slot before the stream gives up."""


@dataclass(frozen=True)
class Mixture:
    """How samples are drawn, beyond each of them once an epoch."""

    labelled_fraction: float | None = None
    """Share of every batch, held exactly, that shows cases whose labels may be read; None leaves it to chance."""
    class_aware: bool = True
    """Within that share every annotated class is shown equally often, whatever the number of patches that hold it."""
    upsampling: Mapping[str, float] = field(default_factory=dict)
    """Data set → how often its samples come in an epoch, on average; 1 where it is not named."""


@dataclass
class Batch:
    """B patches of X×Y×Z voxels, as they are stored."""

    image: torch.Tensor
    """(B, 1, X, Y, Z) int16, HU."""
    label: torch.Tensor
    """(B, X, Y, Z) uint8, the catalogue's classes, 255 where ignored; all 0 where the case's label may not be used."""
    candidate_bits: torch.Tensor
    """(B, C + 2, W) int64: row b, column k is what a voxel of label k in patch b may be, as a bit mask of W words; the
    last column is for ignored voxels (`Catalogue.candidate_bits`)."""
    spacing: torch.Tensor
    """(B, 3) float32, mm."""
    keys: list[str]
    slots: list[int]
    """The place of each patch in the run: what its augmentation's random numbers are to depend on."""

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.image, self.label, self.candidate_bits, self.spacing

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies from pinned memory do not wait for it."""
        image, label, candidate_bits, spacing = (tensor.to(device, non_blocking=True) for tensor in self.tensors)
        return Batch(image, label, candidate_bits, spacing, self.keys, self.slots)


class PatchStream:
    """Patches in batches for this rank, over epochs without end.

    The run's slots are numbered: step s of a global batch of `batch_size` samples holds the slots s·B … s·B + B - 1,
    of which each of `accumulation_steps` parts gives every rank its share, in the order of ranks. What a slot shows is
    a pure function of (manifest digest, selection, mixture, seed, batch_size, slot); neither ranks nor workers nor
    accumulation enter. Without a mixture an epoch shows every selected sample exactly once, and the next begins in the
    middle of a batch where the number of samples is no multiple of it.

    `shards` is a folder or URL. `cases` are those whose patches come (None: all). Labels come of `label_cases` alone:
    another case's label is not even read, its voxels are 0 and may be anything. They come of `label_classes` alone
    (None: all): voxels of another class are 0, as if nobody had looked for it. `workers` 0 reads in this process.
    Batches are on `device`; in the CPU's memory they are used again once their tensors are gone.

    A sample that cannot be read is replaced by one that depends on the slot alone, reported to the log and, one JSON
    line each, to the file `quarantine`; beyond a share of `max_bad_fraction` of the selected samples the stream stops.
    A stream knows of those that other ranks met by `also_bad` alone.

    Raises `ManifestError` or `StorageError` for shards that cannot be read, `StreamError` for a case or data set that
    they do not hold, a share that does not fit into a batch, and while iterating for too many bad samples, and for a
    worker process that died.
    """

    def __init__(
        self,
        shards: Path | str,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        label_cases: Collection[str],
        cases: Collection[str] | None = None,
        label_classes: Collection[str] | None = None,
        mixture: Mixture = Mixture(),
        rank: int = 0,
        world_size: int = 1,
        accumulation_steps: int = 1,
        device: torch.device | None = None,
        cache: CacheConfig | None = None,
        quarantine: Path | None = None,
        max_bad_fraction: float = 0.001,
    ) -> None:
        if batch_size % (parts := world_size * accumulation_steps):
            raise StreamError(
                f"a batch of {batch_size} cannot be shared by {world_size} ranks in {accumulation_steps} parts; "
                f"give a multiple of {parts}"
            )
        self._store = open_store(shards, cache)
        self._manifest = Manifest.load(self._store)
        self._samples = _Samples(self._store, self._manifest, cases, label_cases, label_classes)
        self._order = _order(self._samples, mixture, batch_size, seed)
        self._mixture = mixture
        self._share = batch_size // (world_size * accumulation_steps)
        self._rank, self._world_size = rank, world_size
        self._workers = workers
        self._device = device or torch.device("cpu")
        self._bad = _BadSamples(quarantine, max_bad_fraction, len(self._samples.selected), self._store)
        self._slot = 0
        selection = [sorted(cases) if cases is not None else None, sorted(label_cases)]
        if label_classes is not None:
            selection.append(sorted(label_classes))
        drawing = [mixture.labelled_fraction, mixture.class_aware, sorted(mixture.upsampling.items())]
        self._identity: dict[str, int | str] = {
            "manifest": self._manifest.digest,
            "selection": digest(json.dumps(selection).encode()),
            "mixture": digest(json.dumps(drawing).encode()),
            "seed": seed,
            "batch_size": batch_size,
        }

    @property
    def samples_per_epoch(self) -> int:
        """Draws until every selected sample has come once; with a labelled share, every sample outside of it."""
        return self._order.epoch_size

    def position(self) -> dict[str, int | str]:
        """How many slots have been taken, by all ranks, and all that the order depends on; the same on every rank."""
        return {"slot": self._slot} | self._identity

    def seek(self, position: Mapping[str, int | str]) -> None:
        """Make the next iteration begin at `position`; raises `StreamError` when this stream has another order."""
        for name, mine in self._identity.items():
            if position.get(name) != mine:
                raise StreamError(
                    f"cannot continue the stream: {name} was {position.get(name)} and is {mine}; "
                    "go on with the same shards and settings, or start a new run"
                )
        slot = int(position["slot"])
        if slot % (self._share * self._world_size):
            raise StreamError(f"cannot continue the stream: slot {slot} lies within a step; start a new run")
        self._slot = slot

    @property
    def bad_samples(self) -> list[int]:
        """Numbers of the samples known to be unreadable."""
        return sorted(self._bad.known)

    def also_bad(self, samples: Iterable[int]) -> None:
        """Count what other ranks could not read; raises `StreamError` where all together are too many."""
        self._bad.learn(samples)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `position()` on."""
        batches = self._on_device() if self._device.type == "cuda" else self._in_memory()
        with closing(batches):
            for batch in batches:
                self._slot += self._share * self._world_size
                yield batch

    def _in_memory(self) -> Generator[Batch, None, None]:
        """Batches in memory that the worker processes filled, as many ahead as the ring wants."""
        reader = SampleReader(self._store, self._manifest, self._samples.label_numbers)
        shape, labels = self._manifest.patch_size, self._samples.has_labels
        with closing(Ring(reader, shape, self._share, labels, self._workers, self._replace)) as ring:
            if self._device.type == "cuda":
                _pin(ring)
            next_slot = self._slot
            count = self._count()
            while True:
                while len(ring) < ring.ahead:
                    first = next_slot + self._rank * self._share
                    ring.submit(self._wanted(first, self._order.draw(first, self._share)))
                    next_slot += self._share * self._world_size
                filled = ring.take()
                if count:
                    count.add(filled.outcomes)
                yield self._batch(filled)

    def _on_device(self) -> Generator[Batch, None, None]:
        """Batches on the GPU: while one is used, the next crosses on a stream of its own."""
        copying = torch.cuda.Stream(self._device)
        crossing: tuple[Batch, Batch] | None = None
        with closing(self._in_memory()) as batches:
            for host in batches:
                arrived, crossing = crossing, None
                if arrived:
                    torch.cuda.current_stream(self._device).wait_stream(copying)
                    copying.synchronize()  # its host memory may be filled anew once it is let go of
                with torch.cuda.stream(copying):
                    crossing = (host.to(self._device), host)
                if arrived:
                    for tensor in arrived[0].tensors:
                        tensor.record_stream(torch.cuda.current_stream(self._device))
                    yield arrived[0]

    def _count(self) -> _EpochCount | None:
        """A mixture has no epochs in which each sample must come once."""
        if self._mixture.labelled_fraction is not None or self._mixture.upsampling:
            return None
        samples, selected = self._manifest.patches, len(self._samples.selected)
        return _EpochCount(samples, selected, self._slot, self._rank, self._world_size, self._share)

    def _wanted(self, first: int, samples: np.ndarray) -> list[Wanted]:
        labelled = self._samples.may_read_label(samples)
        return [
            Wanted(row, first + row, 0, int(sample), bool(label))
            for row, (sample, label) in enumerate(zip(samples, labelled, strict=True))
        ]

    def _replace(self, outcome: RowRead) -> Wanted:
        """What a row that could not be filled shows instead; raises `StreamError` when there are too many of them."""
        if outcome.unreachable:  # to show another sample would make the run depend on the network
            raise StreamError(f"{outcome.cause}; when it is there again, run again with --resume latest")
        self._bad.add(outcome)
        slot, attempt = outcome.wanted.slot, outcome.wanted.attempt + 1
        if attempt > MAX_ATTEMPTS:
            raise StreamError(f"{MAX_ATTEMPTS} samples in turn cannot be read ({outcome.cause}); check the shards")
        sample = self._order.replacement(slot, attempt)
        (label,) = self._samples.may_read_label(np.array([sample]))
        return Wanted(outcome.wanted.row, slot, attempt, sample, bool(label))

    def _batch(self, filled: Filled) -> Batch:
        outcomes = filled.outcomes
        cases = self._samples.cases_of(np.array([outcome.wanted.sample for outcome in outcomes]))
        for outcome, case in zip(outcomes, cases, strict=True):
            name = self._manifest.cases[case].name
            if case_of(outcome.key) != name:
                where = f"{self._store.path(outcome.shard)}: {outcome.key}"
                raise StreamError(f"{where} lies where the manifest has {name}; {ANEW}")
        image = torch.from_numpy(filled.image)[:, None]
        shape = (len(outcomes), *self._manifest.patch_size)
        return Batch(
            image=image,
            label=torch.zeros((), dtype=torch.uint8).expand(shape)
            if filled.label is None
            else torch.from_numpy(filled.label),
            candidate_bits=torch.from_numpy(np.stack([self._samples.candidate_bits(case) for case in cases])),
            spacing=torch.from_numpy(self._samples.spacing_mm[cases]),
            keys=[outcome.key for outcome in outcomes],
            slots=[outcome.wanted.slot for outcome in outcomes],
        )


class _Samples:
    """Which samples are selected, and what the manifest knows of each."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        cases: Collection[str] | None,
        label_cases: Collection[str],
        label_classes: Collection[str] | None,
    ) -> None:
        self.manifest, self._store = manifest, store
        if unknown := set(label_classes or ()) - set(manifest.classes):
            where = store.path("manifest.json")
            raise StreamError(f"{where}: has no class {min(unknown)}; choose among {', '.join(manifest.classes)}")
        self._classes = set(manifest.classes if label_classes is None else label_classes)
        self._number = {case.name: number for number, case in enumerate(manifest.cases)}
        if unknown := (set(cases or ()) | set(label_cases)) - self._number.keys():
            where = store.path("manifest.json")
            raise StreamError(f"{where}: has no case {min(unknown)}; `mixcl shards inspect` lists what it holds")
        self._case = manifest.read_table(store, CASES_FILE)
        self._label_case = self._mask(label_cases)
        everything = np.arange(len(self._case), dtype=np.uint32)
        self.selected = everything if cases is None else everything[self._mask(cases)[self._case]]
        self.has_labels = bool(label_cases)
        self.spacing_mm = np.array([case.spacing_mm for case in manifest.cases], dtype=np.float32)

    @property
    def label_numbers(self) -> np.ndarray | None:
        """(256,) uint8: what each stored label is read as; None where all stay as they are."""
        hidden = [k for k, name in enumerate(self.manifest.classes, start=1) if name not in self._classes]
        numbers = np.arange(256, dtype=np.uint8)
        numbers[hidden] = 0
        return numbers if hidden else None

    def _reliable(self, case: CaseRecord) -> list[str]:
        return [name for name in case.reliable if name in self._classes]

    def _mask(self, names: Collection[str]) -> np.ndarray:
        """(cases,) bool: those of `names`."""
        mask = np.zeros(len(self._number), dtype=bool)
        mask[[self._number[name] for name in names]] = True
        return mask

    def may_read_label(self, samples: np.ndarray) -> np.ndarray:
        """(N,) bool."""
        return self._label_case[self._case[samples]]

    def cases_of(self, samples: np.ndarray) -> np.ndarray:
        """(N,) positions in the manifest's cases."""
        return self._case[samples]

    @lru_cache(maxsize=4096)  # noqa: B019 - lives as long as the stream
    def candidate_bits(self, case: int) -> np.ndarray:
        reliable = self._reliable(self.manifest.cases[case]) if self._label_case[case] else None
        return Catalogue(self.manifest.classes).candidate_bits(reliable)

    def copies(self, samples: np.ndarray, upsampling: Mapping[str, float]) -> np.ndarray | None:
        """How often each of `samples` comes in an epoch."""
        if not upsampling:
            return None
        datasets = {case.dataset for case in self.manifest.cases}
        if unknown := set(upsampling) - datasets:
            raise StreamError(
                f"data.upsampling: there is no data set {min(unknown)}; choose among {', '.join(sorted(datasets))}"
            )
        factor = np.array([upsampling.get(case.dataset, 1.0) for case in self.manifest.cases])
        return factor[self._case[samples]]

    def by_class(self, samples: np.ndarray) -> list[np.ndarray]:
        """Of `samples`, those that hold each class that is reliably annotated in their case; no empty ones."""
        present = self.manifest.read_table(self._store, CLASSES_FILE)[samples]
        classes = len(self.manifest.classes)
        reliable = np.zeros((len(self.manifest.cases), classes), dtype=bool)
        for row, case in enumerate(self.manifest.cases):
            reliable[row, [self.manifest.classes.index(name) for name in self._reliable(case)]] = True
        holds = np.unpackbits(present, axis=1, count=classes, bitorder="little").astype(bool)
        holds &= reliable[self._case[samples]]
        return [samples[column] for column in holds.T if column.any()]


class _EpochCount:
    """Asserts that an epoch shows no sample twice, and as many on this rank as it has slots."""

    def __init__(self, samples: int, selected: int, first_slot: int, rank: int, world_size: int, share: int) -> None:
        self._size, self._first_slot = selected, first_slot
        self._rank, self._world_size, self._share = rank, world_size, share
        self._epoch, self._shown = first_slot // selected, 0
        self._seen = np.zeros(samples, dtype=bool)

    def add(self, outcomes: Sequence[RowRead]) -> None:
        """Count rows in the order of their slots; raises `StreamError`."""
        for wanted, *_ in outcomes:
            epoch = wanted.slot // self._size
            if epoch > self._epoch:
                self._close()
                self._epoch, self._shown = epoch, 0
                self._seen[:] = False
            self._shown += 1
            if wanted.attempt == 0:  # a replacement may well come in its own place, too
                if self._seen[wanted.sample]:
                    raise StreamError(f"epoch {epoch} shows sample {wanted.sample} twice: a defect, please report it")
                self._seen[wanted.sample] = True

    def _close(self) -> None:
        begin = max(self._first_slot, self._epoch * self._size)
        expected = self._mine_before((self._epoch + 1) * self._size) - self._mine_before(begin)
        if self._shown != expected:
            what = f"epoch {self._epoch} showed {self._shown} samples where {expected} belong to rank {self._rank}"
            raise StreamError(f"{what}: a defect, please report it")

    def _mine_before(self, slot: int) -> int:
        """This rank's slots before `slot`."""
        rounds, rest = divmod(slot, self._share * self._world_size)
        return rounds * self._share + min(max(rest - self._rank * self._share, 0), self._share)


class _BadSamples:
    """Keeps count of samples that could not be read, and tells of each once."""

    def __init__(self, quarantine: Path | None, max_fraction: float, population: int, store: Store) -> None:
        self._quarantine, self._max_fraction, self._population = quarantine, max_fraction, population
        self._store = store
        self.known: set[int] = set()

    def add(self, outcome: RowRead) -> None:
        if outcome.wanted.sample in self.known:
            return
        self.known.add(outcome.wanted.sample)
        shard, key = self._store.path(outcome.shard), outcome.key or f"sample {outcome.wanted.sample}"
        logger.warning("%s: %s cannot be used, another sample stands in for it: %s", shard, key, outcome.cause)
        if self._quarantine:
            entry = {"shard": shard, "key": key, "cause": outcome.cause, "slot": outcome.wanted.slot}
            with self._quarantine.open("a") as file:  # one write, so that ranks may share the file
                file.write(json.dumps(entry) + "\n")
        self._check(f"{shard}: {key}: {outcome.cause}")

    def learn(self, samples: Iterable[int]) -> None:
        self.known.update(samples)
        self._check(self._store.path(""))

    def _check(self, where: str) -> None:
        if len(self.known) > self._max_fraction * self._population:
            listed = f", listed in {self._quarantine}" if self._quarantine else ""
            raise StreamError(
                f"{where}; {len(self.known)} of {self._population} samples cannot be read{listed}, more than "
                f"data.max_bad_fraction {self._max_fraction:g} allows; run `mixcl shards verify`"
            )


def _order(samples: _Samples, mixture: Mixture, batch_size: int, seed: int) -> Order:
    def deck(name: str, chosen: np.ndarray) -> Deck:
        key = f"{samples.manifest.digest} {seed} {name}"
        return Deck(chosen, samples.manifest.first_of_shard, key, samples.copies(chosen, mixture.upsampling))

    if mixture.labelled_fraction is None:
        rest, labelled, quota = samples.selected, [], 0
    else:
        quota = round(mixture.labelled_fraction * batch_size)
        if abs(quota - mixture.labelled_fraction * batch_size) > 1e-6:
            raise StreamError(
                f"data.labelled_fraction {mixture.labelled_fraction} of a batch of {batch_size} is no whole number of "
                f"samples; the nearest is {quota / batch_size:.9g}"
            )
        has_label = samples.may_read_label(samples.selected)
        rest, of_label = samples.selected[~has_label], samples.selected[has_label]
        parts = samples.by_class(of_label) if mixture.class_aware else [of_label]
        labelled = [deck(f"class {number}", part) for number, part in enumerate(parts) if len(part)]
    lacks = None
    if quota and not labelled:
        lacks = "no labels may be read"
    elif len(rest) < batch_size - quota:
        lacks = f"fewer than {batch_size - quota} patches without labels" if quota else f"{len(rest)} patches"
    if lacks:
        cure = "lower the batch size, or change data.labelled_fraction"
        raise StreamError(f"the selected cases do not fill a batch of {batch_size}: {lacks}; {cure}")
    return Order(deck("samples", rest), batch_size, seed, labelled, quota)


def _pin(ring: Ring) -> None:
    """Let the GPU read the ring's memory directly; where it may not, copies are only slower."""
    address, size = np.frombuffer(ring.memory, np.uint8).ctypes.data, len(ring.memory)
    error = torch.cuda.cudart().cudaHostRegister(address, size, 0)
    if int(error) != 0:
        with suppress(
            RuntimeError
        ):  # CUDA keeps the error for whoever launches next: that is done here, where it is known
            torch.ones(1, device="cuda")
        logger.warning("the memory of batches could not be pinned (CUDA error %s)", int(error))
