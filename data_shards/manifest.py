"""What a set of shards holds: written last, so that its presence says that the build was finished."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xxhash
from pydantic import Field, TypeAdapter, ValidationError

from mixcl_dist.data_shards.shard import read_index, verify_shard
from mixcl_dist.data_shards.storage import StorageError, Store, open_store, publish

FORMAT_VERSION = 2
FILE_NAME = "manifest.json"
CASES_FILE, CLASSES_FILE = "sample-cases.npy", "sample-classes.npy"
HU_BINS = (-1024, 3072, 64)
"""First edge, last edge and number of the histogram's bins; values outside count in the outermost."""


class ManifestError(ValueError):
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
    """Of the voxels as they were read: equal for copies of one scan, whatever their file is called."""


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
    versions: dict[str, str]
    tables: dict[str, str]
    """File → xxh3 of what is known of every sample, in the order of the shards: `sample-cases.npy`, (N,) uint32, is
    the position of its case in `cases`; `sample-classes.npy`, (N, ⌈C / 8⌉) uint8, has bit k - 1 (little-endian) set
    where a voxel has label k."""

    @cached_property
    def digest(self) -> str:
        """xxh3 of 128 bits over the canonical JSON; two builds with one digest have the same samples."""
        return xxhash.xxh3_128_hexdigest(_MANIFEST.dump_json(self))

    @property
    def patches(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def spacing_range_mm(self) -> tuple[tuple[float, float], ...]:
        """Smallest and largest spacing along each axis."""
        spacings = np.array([case.spacing_mm for case in self.cases])
        return tuple((float(axis.min()), float(axis.max())) for axis in spacings.T)

    @classmethod
    def load(cls, shards: Path | str | Store) -> Manifest:
        """Read the manifest of a folder or URL; raises `ManifestError`, and `StorageError` for an unusable URL."""
        store = shards if isinstance(shards, Store) else open_store(shards)
        try:
            return cls.parse(store.read(FILE_NAME), store.path(FILE_NAME))
        except StorageError as error:
            cure = "finish the build with `mixcl shards build`, or give another folder"
            raise ManifestError(f"{error}; {cure}") from None

    @classmethod
    def parse(cls, content: bytes, path: Path | str) -> Manifest:
        """The manifest that `content`, read from `path`, holds; raises `ManifestError`."""
        try:
            version = _VERSION.validate_json(content).version
        except ValidationError:
            raise ManifestError(f"{path}: is not a manifest; build the shards again") from None
        if version != FORMAT_VERSION:
            cure = "update mixcl-dist" if version > FORMAT_VERSION else "build the shards again"
            raise ManifestError(f"{path}: has format {version}, this version reads {FORMAT_VERSION}; {cure}")
        try:
            return _MANIFEST.validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "content"
            raise ManifestError(f"{path}: {field}: {first['msg']}; build the shards again") from None

    def save(self, folder: Path) -> None:
        with publish(Path(folder) / FILE_NAME) as file:
            file.write(_MANIFEST.dump_json(self, indent=1))

    def check_table(self, name: str, content: bytes, path: Path | str) -> np.ndarray:
        """The table `name` in `content`, read from `path`; raises `ManifestError` unless it is the manifest's."""
        if xxhash.xxh3_64_hexdigest(content) != self.tables.get(name):
            raise ManifestError(f"{path}: is not the table that the manifest names; build the shards again")
        return np.load(io.BytesIO(content), allow_pickle=False)


@dataclass(frozen=True)
class _Version:
    version: int


_MANIFEST = TypeAdapter(Manifest)
_VERSION = TypeAdapter(_Version)


def case_of(key: str) -> str:
    """The case that the sample `key` was cut from."""
    return key.rpartition("_")[0]


def verify(folder: Path) -> list[str]:
    """Read all shards completely and list, one line each, what is not as it was built; [] when all is well.

    Raises `ManifestError` when there is no usable manifest to compare with.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    problems: list[str] = []
    keys: Counter[str] = Counter()
    for shard in manifest.shards:
        path = folder / shard.file
        found = verify_shard(path)
        if not found:
            index = read_index(path)
            keys.update(list(index.samples))
            if (len(index.samples), index.bytes, index.xxh3) != (shard.samples, shard.bytes, shard.xxh3):
                found = [f"{path}: is not the shard that the manifest names; build the shards again"]
        problems += found
    known = {shard.file for shard in manifest.shards}
    problems += [f"{p}: is not in the manifest" for p in sorted(folder.glob("shard-*.tar")) if p.name not in known]
    return problems or _count_problems(folder, manifest, keys)


def _count_problems(folder: Path, manifest: Manifest, keys: Counter[str]) -> list[str]:
    problems = [f"{folder}: {key} is in {count} shards" for key, count in keys.items() if count > 1]
    found = Counter(map(case_of, keys))
    stated = Counter({case.name: case.patches for case in manifest.cases})
    for name in sorted(found | stated):
        if found[name] != stated[name]:
            problems.append(f"{folder}: {name} has {found[name]} patches, the manifest says {stated[name]}")
    return problems


def inspect(folder: Path) -> dict[str, Any]:
    """The manifest of `folder` counted up for a table, as plain values; raises `ManifestError`."""
    manifest = Manifest.load(folder)
    groups: dict[tuple[str, str], list[CaseRecord]] = {}
    for case in manifest.cases:
        groups.setdefault((case.dataset, case.split), []).append(case)
    stored = sum(shard.bytes for shard in manifest.shards)
    return {
        "digest": manifest.digest,
        "cases": len(manifest.cases),
        "patches": manifest.patches,
        "shards": len(manifest.shards),
        "bytes": stored,
        "bytes_per_voxel": stored / (manifest.patches * int(np.prod(manifest.patch_size))),
        "patch_size": manifest.patch_size,
        "spacing_mm": manifest.spacing_mm,
        "spacing_range_mm": manifest.spacing_range_mm,
        "classes": manifest.classes,
        "datasets": [
            {
                "dataset": dataset,
                "split": split,
                "cases": len(cases),
                "labelled": sum(case.labelled for case in cases),
                "patches": sum(case.patches for case in cases),
                "annotated": dict(Counter(name for case in cases for name in case.reliable)),
            }
            for (dataset, split), cases in groups.items()
        ],
        "hu_histogram": manifest.hu_histogram,
        "codec": manifest.codec,
        "versions": manifest.versions,
    }
