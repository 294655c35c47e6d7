"""What a set of shards holds: written last, so that its presence says that the build was finished."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xxhash
from pydantic import Field, TypeAdapter, ValidationError

from mixcl_dist.data_shards.errors import DataError
from mixcl_dist.data_shards.format.shard import ANEW
from mixcl_dist.data_shards.storage import open_store
from mixcl_dist.data_shards.storage.publishing import publish
from mixcl_dist.data_shards.storage.store import MissingError, Store

FORMAT_VERSION = 3
FILE_NAME = "manifest.json"
CASES_FILE, CLASSES_FILE = "sample-cases.npy", "sample-classes.npy"
FINGERPRINTS_FILE = "case-fingerprints.npy"
HU_BINS = (-1024, 3072, 64)
"""First edge, last edge and number of the histogram's bins; values outside count in the outermost."""
SPACING_EDGES_MM = (0.0, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5, math.inf)
"""Edges of the bins of `Manifest.spacing_histogram`; a bin holds its lower edge."""

_TABLE_DTYPES: dict[str, np.dtype[Any]] = {
    CASES_FILE: np.dtype("<u4"),
    CLASSES_FILE: np.dtype("u1"),
    FINGERPRINTS_FILE: np.dtype("i1"),
}


class ManifestError(DataError):
    """A folder that cannot be used as shards; the message is one line with the cure."""


@dataclass(frozen=True)
class CaseRecord:
    """One volume that entered the shards."""

    name: str
    """Patches of this case have the keys `{name}_{number:04d}`."""
    dataset: str
    split: str
    reliable: tuple[str, ...]
    """Classes whose label may be relied on; any other is unknown in this case."""
    labelled: bool
    """Whether its samples have a `.seg.b2`."""
    patches: int
    spacing_mm: tuple[float, float, float]
    source_digest: str
    """Of the voxels as they were read, before resampling: equal for copies of one scan, whatever their file's name."""
    label_digest: str | None
    """Of the label as it was read, in the numbers of `Manifest.classes`; None without one."""
    shows_face: bool
    """Whether a face could be rendered from it."""


@dataclass(frozen=True)
class ShardRecord:
    """One tar file, with its size in bytes and its digest."""

    file: Annotated[str, Field(pattern=r"^shard-\d{6,}\.tar$")]
    samples: int
    bytes: int
    xxh3: str
    index_xxh3: str
    """Digest of the index beside it."""


@dataclass(frozen=True)
class Manifest:
    """All that a reader must know before it opens a shard."""

    version: int
    patch_size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float] | None
    """None: every case has its own."""
    classes: tuple[str, ...]
    """Label k > 0 is `classes[k - 1]`."""
    cases: tuple[CaseRecord, ...]
    shards: tuple[ShardRecord, ...]
    codec: dict[str, str]
    hu_histogram: tuple[int, ...]
    """Voxels of all volumes, cropped to the body, in the bins of `HU_BINS`."""
    spacing_histogram: tuple[tuple[int, ...], ...]
    """Cases along X, Y and Z in the bins of `SPACING_EDGES_MM`."""
    annotated: dict[str, dict[str, int]]
    """Data set → class → number of its cases in which the class's label may be relied on."""
    settings: dict[str, Any]
    """How the shards were built: `BuildConfig` without what they do not depend on."""
    versions: dict[str, str]
    tables: dict[str, str]
    """File → xxh3 of its array's bytes. Of every sample, in the order of the shards, `sample-cases.npy`, (N,) uint32,
    has the position of its case in `cases`; `sample-classes.npy`, (N, ⌈C / 8⌉) uint8, has bit k - 1 (little-endian)
    set where a voxel has label k. Of every case `case-fingerprints.npy`, (cases, F) int8, has its `fingerprint`."""

    @cached_property
    def digest(self) -> str:
        """xxh3 of 128 bits over the canonical JSON; two builds with one digest have the same samples."""
        return xxhash.xxh3_128_hexdigest(_MANIFEST.dump_json(self))

    @property
    def patches(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def first_of_shard(self) -> np.ndarray:
        """(shards + 1,) number of each shard's first sample and, last, of all samples."""
        return np.cumsum([0, *(shard.samples for shard in self.shards)])

    @property
    def spacing_range_mm(self) -> tuple[tuple[float, float], ...]:
        """Smallest and largest spacing along each axis."""
        spacings = np.array([case.spacing_mm for case in self.cases])
        return tuple((float(axis.min()), float(axis.max())) for axis in spacings.T)

    @classmethod
    def load(cls, shards: Path | str | Store) -> Manifest:
        """Read the manifest of a folder or URL; raises `ManifestError`, and `StorageError` for an unusable URL."""
        store = _store(shards)
        try:
            return cls.parse(store.read(FILE_NAME), store.path(FILE_NAME))
        except MissingError as error:
            cure = "finish the build with `mixcl shards build`, or give another folder"
            raise ManifestError(f"{error}; {cure}") from None

    @classmethod
    def parse(cls, content: bytes, path: Path | str) -> Manifest:
        """The manifest that `content`, read from `path`, holds; raises `ManifestError`."""
        try:
            version = _VERSION.validate_json(content).version
        except ValidationError:
            raise ManifestError(f"{path}: is not a manifest; {ANEW}") from None
        if version != FORMAT_VERSION:
            cure = "update mixcl-dist" if version > FORMAT_VERSION else ANEW
            raise ManifestError(f"{path}: has format {version}, this version reads {FORMAT_VERSION}; {cure}")
        try:
            return _MANIFEST.validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "content"
            raise ManifestError(f"{path}: {field}: {first['msg']}; {ANEW}") from None

    def save(self, folder: Path) -> None:
        with publish(Path(folder) / FILE_NAME) as file:
            file.write(_MANIFEST.dump_json(self, indent=1))

    def read_table(self, shards: Path | str | Store, name: str) -> np.ndarray:
        """The table `name` beside this manifest; raises `ManifestError`, and `StorageError` where it cannot be had."""
        store = _store(shards)
        try:
            content = store.read(name)
        except MissingError:
            where = store.path(name)
            raise ManifestError(f"{where}: No such file or directory; build the shards again") from None
        return self.check_table(name, content, store.path(name))

    def check_table(self, name: str, content: bytes, path: Path | str) -> np.ndarray:
        """The table `name` in `content`, read from `path`; raises `ManifestError` unless it is the manifest's.

        Rows and columns beyond this manifest's are left out: they are of an append whose own manifest is to follow.
        """
        rows, dtype = len(self.cases) if name == FINGERPRINTS_FILE else self.patches, _TABLE_DTYPES[name]
        table = _stored_array(content, dtype)
        if table is None or table.ndim != (1 if name == CASES_FILE else 2) or len(table) < rows:
            raise ManifestError(f"{path}: is not a table of {rows} rows; {ANEW}")
        table = table[:rows, : math.ceil(len(self.classes) / 8)] if name == CLASSES_FILE else table[:rows]
        if table_digest(table) != self.tables.get(name):
            raise ManifestError(f"{path}: is not the table that the manifest names; {ANEW}")
        if name == CASES_FILE and rows and table.max() >= len(self.cases):
            raise ManifestError(f"{path}: names a case that the manifest does not have; {ANEW}")
        return np.ascontiguousarray(table)


def _store(shards: Path | str | Store) -> Store:
    return shards if isinstance(shards, Store) else open_store(shards)


def table_digest(table: np.ndarray) -> str:
    """As `Manifest.tables` has it."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(table).data)


def spacing_histogram(spacings_mm: Sequence[Sequence[float]]) -> tuple[tuple[int, ...], ...]:
    """As `Manifest.spacing_histogram` has it."""
    rounded = np.round(np.array(spacings_mm), 6)  # a spacing of 1 mm that a header states as 0.99999998
    return tuple(tuple(np.histogram(axis, SPACING_EDGES_MM)[0].tolist()) for axis in rounded.T)


def annotated_by_dataset(cases: Sequence[CaseRecord]) -> dict[str, dict[str, int]]:
    """As `Manifest.annotated` has it."""
    counts: dict[str, dict[str, int]] = {}
    for case in cases:
        of_dataset = counts.setdefault(case.dataset, {})
        for name in case.reliable:
            of_dataset[name] = of_dataset.get(name, 0) + 1
    return counts


def _stored_array(content: bytes, dtype: np.dtype) -> np.ndarray | None:
    """The array of an .npy file without a copy; None where it is of another type or does not fill the file."""
    stream = io.BytesIO(content)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            return None
        shape, fortran, stored = np.lib.format.read_array_header_1_0(stream)
    except Exception:  # its parser has many ways to fail, all of which say that this is no such file
        return None
    size = len(content) - stream.tell()
    if stored != dtype or fortran or any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != size:
        return None
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape)


@dataclass(frozen=True)
class _Version:
    version: int


_MANIFEST = TypeAdapter(Manifest)
_VERSION = TypeAdapter(_Version)


def sample_key(case: str, number: int) -> str:
    """The key of a case's patch."""
    return f"{case}_{number:04d}"


def case_of(key: str) -> str:
    """The case that the sample `key` was cut from."""
    return key.rpartition("_")[0]
