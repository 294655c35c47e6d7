"""Stage 2 of a build: the patches of all new cases, in one random order, → shards, tables and the manifest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import xxhash

from mixcl_dist.data_shards.building.processes import Mapper
from mixcl_dist.data_shards.building.settings import BuildConfig, BuildError, Progress
from mixcl_dist.data_shards.building.spool import Spooled, shard_of
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.format.codec import CT_MEMBERS, DESCRIPTION, SEG_MEMBER, digest
from mixcl_dist.data_shards.format.manifest import (
    CASES_FILE,
    CLASSES_FILE,
    FINGERPRINTS_FILE,
    FORMAT_VERSION,
    Manifest,
    ShardRecord,
    annotated_by_dataset,
    sample_key,
    spacing_histogram,
    table_digest,
)
from mixcl_dist.data_shards.format.shard import Member, index_path, read_index, read_sample, write_shard
from mixcl_dist.data_shards.storage.publishing import publish
from mixcl_dist.data_shards.versions import versions_of

PACKAGES = ("numpy", "scipy", "blosc2", "pcodec", "webdataset", "mixcl-dist")


def write_shards(
    used: Sequence[Spooled],
    base: Manifest | None,
    catalogue: Catalogue,
    config: BuildConfig,
    spool: Path,
    out: Path,
    run: Mapper,
    progress: Progress,
) -> Manifest:
    """Draw the spooled patches of all `used` cases into shards behind those of `base`, then publish the manifest.

    Neighbours in a shard so come from different volumes, and a batch needs no large shuffle buffer to be mixed. The
    order follows from the seed and the first shard's number alone: shards that an interrupted build finished are kept.
    """
    first = len(base.shards) if base else 0
    case = np.repeat(np.arange(len(used)), [one.record.patches for one in used])
    number = np.concatenate([np.arange(one.record.patches) for one in used])
    order = np.random.default_rng([config.seed, first]).permutation(len(case))
    case, number = case[order], number[order]
    names = [one.record.name for one in used]
    drawn = [
        (first + place, [(names[c], int(n)) for c, n in zip(case[begin:end], number[begin:end], strict=True)])
        for place, begin in enumerate(range(0, len(order), config.samples_per_shard))
        for end in [begin + config.samples_per_shard]
    ]
    _forget_other_draws(out, first, base, used)
    shards = []
    for _, record, death in run(partial(_draw_shard, spool, out), drawn):
        if record is None:
            raise BuildError(f"{out}: the process that wrote a shard died ({death}); build again: what is done is kept")
        shards.append(record)
        progress(len(shards), len(drawn), "shard")
    shards.sort(key=lambda shard: shard.file)
    tables = _write_tables(out, base, used, catalogue, case, number)
    manifest = _manifest(base, used, catalogue, config, shards, tables)
    manifest.save(out)
    draw_note(out).unlink()
    return manifest


def unfinished_shards(out: Path, first: int) -> list[Path]:
    """Shards, and indices, from number `first` on."""
    numbered = {path: path.name.removeprefix("shard-").partition(".")[0] for path in out.glob("shard-*")}
    return sorted(path for path, number in numbered.items() if number.isdecimal() and int(number) >= first)


def draw_note(out: Path) -> Path:
    """Says which cases the shards that no manifest names yet were drawn from."""
    return out / ".build" / "draw"


def _forget_other_draws(out: Path, first: int, base: Manifest | None, used: Sequence[Spooled]) -> None:
    """Remove the shards of an interrupted build whose cases were not the same."""
    drawn = [base.digest if base else None, *(dataclasses.astuple(one.record) for one in used)]
    draw, note = xxhash.xxh3_128_hexdigest(json.dumps(drawn).encode()), draw_note(out)
    if not note.exists() or note.read_text() != draw:
        for path in unfinished_shards(out, first):
            path.unlink()
        with publish(note) as file:
            file.write(draw.encode())


def _draw_shard(spool: Path, out: Path, drawn: tuple[int, Sequence[tuple[str, int]]]) -> ShardRecord:
    """Write one shard, given its number and its patches as case and patch number, unless it is there."""
    number, patches = drawn
    path = out / f"shard-{number:06d}.tar"
    if path.exists() and index_path(path).exists():
        index = read_index(path)
    else:
        samples = ((sample_key(case, n), _spooled_sample(spool, case, sample_key(case, n))) for case, n in patches)
        index = write_shard(path, samples)
    beside = digest(index_path(path).read_bytes())
    return ShardRecord(path.name, len(index.samples), index.bytes, index.xxh3, beside)


def _spooled_sample(spool: Path, case: str, key: str) -> dict[str, bytes]:
    path = shard_of(spool, case)
    return read_sample(path, key, _spooled_index(path, path.stat().st_mtime_ns)[key])


@lru_cache(maxsize=512)
def _spooled_index(path: Path, written: int) -> dict[str, dict[str, Member]]:
    """The index of a case's shard, as long as it is the one that was `written` then."""
    return read_index(path).samples


def _manifest(
    base: Manifest | None,
    used: Sequence[Spooled],
    catalogue: Catalogue,
    config: BuildConfig,
    shards: Sequence[ShardRecord],
    tables: dict[str, str],
) -> Manifest:
    cases = (*(base.cases if base else ()), *(one.record for one in used))
    histograms = [base.hu_histogram] if base else []
    return Manifest(
        version=FORMAT_VERSION,
        patch_size=config.patch_size,
        spacing_mm=config.spacing_mm,
        classes=catalogue.classes,
        cases=cases,
        shards=(*(base.shards if base else ()), *shards),
        codec={member: DESCRIPTION[member] for member in (CT_MEMBERS[config.codec], SEG_MEMBER)},
        hu_histogram=tuple(np.sum([*histograms, *(one.hu_histogram for one in used)], axis=0).tolist()),
        spacing_histogram=spacing_histogram([case.spacing_mm for case in cases]),
        annotated=annotated_by_dataset(cases),
        settings=config.recorded(),
        versions=versions_of(PACKAGES),
        tables=tables,
    )


def _write_tables(
    out: Path,
    base: Manifest | None,
    used: Sequence[Spooled],
    catalogue: Catalogue,
    case: np.ndarray,
    number: np.ndarray,
) -> dict[str, str]:
    """Publish the tables: first the rows of `base`, then those of the drawn patches; returns their digests.

    `case` and `number` say of each drawn patch its position in `used` and its number in the case. Until the new
    manifest is there, the old one finds its own rows and columns at the beginning.
    """
    present = np.zeros((len(case), len(catalogue.classes)), dtype=bool)
    for row, (c, n) in enumerate(zip(case, number, strict=True)):
        labels = np.array(used[c].present[n], dtype=int)
        present[row, labels[(labels > 0) & (labels <= len(catalogue.classes))] - 1] = True
    marks = np.stack([np.frombuffer(bytes.fromhex(one.fingerprint), np.int8) for one in used])
    added = {
        CASES_FILE: (case + (len(base.cases) if base else 0)).astype("<u4"),
        CLASSES_FILE: np.packbits(present, axis=1, bitorder="little"),
        FINGERPRINTS_FILE: marks,
    }
    return {name: _write_table(out / name, base, rows) for name, rows in added.items()}


def _write_table(path: Path, base: Manifest | None, rows: np.ndarray) -> str:
    if base:
        before = base.read_table(path.parent, path.name)
        if before.ndim == 2:
            before = np.pad(before, ((0, 0), (0, rows.shape[1] - before.shape[1])))
        rows = np.concatenate([before, rows])
    with publish(path) as file:
        np.lib.format.write_array(file, rows, version=(1, 0), allow_pickle=False)
    return table_digest(rows)
