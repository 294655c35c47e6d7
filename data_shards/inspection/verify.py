"""Whether every byte of a set of shards is as it was built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixcl_dist.data_shards.building.processes import in_processes, in_this_process
from mixcl_dist.data_shards.building.settings import Progress
from mixcl_dist.data_shards.format.codec import digest
from mixcl_dist.data_shards.format.manifest import CASES_FILE, Manifest, ManifestError, ShardRecord, case_of
from mixcl_dist.data_shards.format.shard import ANEW, ShardIndex, index_path, read_index, verify_shard
from mixcl_dist.data_shards.storage.store import StorageError


class _Checked(NamedTuple):
    problems: list[str]
    keys: list[str]
    """Of the index, where it can be read."""


def verify(folder: Path, workers: int = 1, progress: Progress = lambda done, total, unit: None) -> list[str]:
    """Read all shards completely and list, one line each, what is not as it was built; [] when all is well.

    Compared are every payload, header, index and table with their digests, the number and names of samples with the
    manifest, and what plain WebDataset reads with the index. `workers` processes do so side by side. Raises
    `ManifestError` when there is no usable manifest to compare with.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    run = in_this_process if workers == 1 else in_processes(workers)
    checked: dict[str, _Checked] = {}
    for record, result, death in run(partial(_check_shard, folder), manifest.shards):
        died = _Checked([f"{folder / record.file}: the process that read it died ({death})"], [])
        checked[record.file] = result or died
        progress(len(checked), len(manifest.shards), "shard")
    checked = {shard.file: checked[shard.file] for shard in manifest.shards}
    problems = [line for result in checked.values() for line in result.problems] + list(_repeated(folder, checked))
    others = [*_strangers(folder, manifest), *_tables(folder, manifest)]
    # With a shard amiss the counts are, too, which would say nothing new.
    return problems + others if problems else others + list(_miscounts(folder, manifest, checked))


def _check_shard(folder: Path, record: ShardRecord) -> _Checked:
    path = folder / record.file
    found = verify_shard(path)
    try:
        index = read_index(path)
        named = digest(index_path(path).read_bytes()) == record.index_xxh3
    except (ValueError, OSError):
        return _Checked(found, [])
    if not found and (index.bytes, index.xxh3) != (record.bytes, record.xxh3):
        found = [f"{path}: is not the shard that the manifest names; {ANEW}"]
    elif not found and (not named or len(index.samples) != record.samples):
        found = [f"{index_path(path)}: is not the index that the manifest names; {ANEW}"]
    return _Checked(found or list(_webdataset_problems(path, index)), list(index.samples))


def _webdataset_problems(path: Path, index: ShardIndex) -> Iterator[str]:
    """What an independent reader sees otherwise."""
    import webdataset  # slow to import, and nothing else here needs it

    expected = iter(index.samples.items())
    for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
        key, members = next(expected, ("no sample", {}))
        seen = {name: digest(payload) for name, payload in sample.items() if not name.startswith("__")}
        if (sample["__key__"], seen) != (key, {name: member.xxh3 for name, member in members.items()}):
            yield f"{path}: webdataset reads {sample['__key__']} where the index has {key}"
            return
    if (left := next(expected, None)) is not None:
        yield f"{path}: webdataset ends before {left[0]}"


def _strangers(folder: Path, manifest: Manifest) -> Iterator[str]:
    known = {shard.file for shard in manifest.shards}
    for path in sorted(folder.glob("shard-*.tar")):
        if path.name not in known:
            yield f"{path}: is not in the manifest; finish the build that appends it, or remove it"


def _repeated(folder: Path, checked: dict[str, _Checked]) -> Iterator[str]:
    """One line for each group of shards that have keys in common."""
    counts = Counter(key for result in checked.values() for key in result.keys)
    holders: dict[str, list[str]] = {key: [] for key, count in counts.items() if count > 1}
    for file, result in checked.items():
        for key in holders.keys() & result.keys:
            holders[key].append(file)
    groups: dict[tuple[str, ...], list[str]] = {}
    for key, files in holders.items():
        groups.setdefault(tuple(files), []).append(key)
    for shards, keys in groups.items():
        more = f" and {len(keys) - 1} more keys are" if len(keys) > 1 else " is"
        yield f"{folder}: {keys[0]}{more} in {' and '.join(shards)}; {ANEW}"


def _tables(folder: Path, manifest: Manifest) -> Iterator[str]:
    for name in manifest.tables:
        try:
            manifest.read_table(folder, name)
        except (ManifestError, StorageError) as error:
            yield str(error)


def _miscounts(folder: Path, manifest: Manifest, checked: dict[str, _Checked]) -> Iterator[str]:
    """Cases whose samples are not as the manifest and its table say; every key has been read."""
    found = [case_of(key) for result in checked.values() for key in result.keys]
    stated, counts = {case.name: case.patches for case in manifest.cases}, Counter(found)
    for name in sorted(counts | stated):
        if counts[name] != stated.get(name, 0):
            yield f"{folder}: {name} has {counts[name]} patches, the manifest says {stated.get(name, 0)}"
    path = folder / CASES_FILE
    try:
        rows = manifest.read_table(folder, CASES_FILE)
    except (ManifestError, StorageError):
        return  # which `_tables` has told
    names = np.array([case.name for case in manifest.cases])[rows]
    if (wrong := np.flatnonzero(names != np.array(found))).size:
        yield f"{path}: says {names[wrong[0]]} of a sample of {found[wrong[0]]}; {ANEW}"
