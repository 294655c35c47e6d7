"""Stage 2 of a build: the patches of all cases, in one random order, → shards and their manifest."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mixcl_dist.data_shards.build import BuildConfig, Progress
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.codec import DESCRIPTION, digest
from mixcl_dist.data_shards.manifest import CASES_FILE, CLASSES_FILE, FORMAT_VERSION, Manifest, ShardRecord
from mixcl_dist.data_shards.shard import index_path, read_index, read_sample, write_shard
from mixcl_dist.data_shards.spool import Spooled, shard_of
from mixcl_dist.data_shards.storage import publish


def write_shards(
    used: Sequence[Spooled],
    catalogue: Catalogue,
    config: BuildConfig,
    spool: Path,
    out: Path,
    progress: Progress,
) -> None:
    """Draw the spooled patches of all `used` cases into shards in `out`, then write the manifest.

    Neighbours in a shard so come from different volumes, and a batch needs no large shuffle buffer to be mixed. The
    order follows from the seed alone: shards that an interrupted build finished are kept.
    """
    shard_of_case = {case.record.name: shard_of(spool, case.record.name) for case in used}
    places = {name: read_index(path).samples for name, path in shard_of_case.items()}
    keys = [(name, key) for name, samples in places.items() for key in samples]
    order = np.random.default_rng(config.seed).permutation(len(keys))
    drawn = [order[first : first + config.samples_per_shard] for first in range(0, len(keys), config.samples_per_shard)]
    shards = []
    for number, numbers in enumerate(drawn):
        path = out / f"shard-{number:06d}.tar"
        if path.exists() and index_path(path).exists():
            index = read_index(path)
        else:
            chosen = (keys[i] for i in numbers)
            samples = ((key, read_sample(shard_of_case[name], key, places[name][key])) for name, key in chosen)
            index = write_shard(path, samples)
        beside = digest(index_path(path).read_bytes())
        shards.append(ShardRecord(path.name, len(index.samples), index.bytes, index.xxh3, beside))
        progress(number + 1, len(drawn), "shard")
    cases, present = _sample_tables(used, len(catalogue.classes))
    Manifest(
        version=FORMAT_VERSION,
        patch_size=config.patch_size,
        spacing_mm=config.spacing_mm,
        classes=catalogue.classes,
        cases=tuple(case.record for case in used),
        shards=tuple(shards),
        codec=DESCRIPTION,
        hu_histogram=tuple(np.sum([case.hu_histogram for case in used], axis=0).tolist()),
        versions={package: version(package) for package in ("numpy", "blosc2", "webdataset")},
        tables={
            CASES_FILE: _write_table(out / CASES_FILE, cases[order]),
            CLASSES_FILE: _write_table(out / CLASSES_FILE, present[order]),
        },
    ).save(out)


def _sample_tables(used: Sequence[Spooled], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the patches of all cases one after another: the case's number, and a bit for every class present."""
    cases = np.repeat(np.arange(len(used), dtype=np.uint32), [case.record.patches for case in used])
    present = np.zeros((len(cases), classes), dtype=bool)
    for row, labels in enumerate(labels for case in used for labels in case.present):
        present[row, [label - 1 for label in labels if label > 0]] = True
    return cases, np.packbits(present, axis=1, bitorder="little")


def _write_table(path: Path, table: np.ndarray) -> str:
    content = io.BytesIO()
    np.save(content, table, allow_pickle=False)
    with publish(path) as file:
        file.write(content.getvalue())
    return digest(content.getvalue())
