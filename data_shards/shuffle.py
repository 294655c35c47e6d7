"""Stage 2 of a build: the patches of all cases, in one random order, → shards and their manifest."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mixcl_dist.data_shards.build import BuildConfig, Progress
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.codec import DESCRIPTION
from mixcl_dist.data_shards.manifest import FORMAT_VERSION, Manifest, ShardRecord
from mixcl_dist.data_shards.shard import index_path, read_index, read_sample, write_shard
from mixcl_dist.data_shards.spool import Spooled, shard_of


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
        shards.append(ShardRecord(path.name, len(index.samples), index.bytes, index.xxh3))
        progress(number + 1, len(drawn), "shard")
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
    ).save(out)
