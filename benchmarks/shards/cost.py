"""What indices, tables and manifest cost for each million patches: bytes, time to read, memory.

    python benchmarks/shards/cost.py --out benchmarks/results/shards

The set is made up: a million patches of 40,000 cases, each labelled, in shards of 256, named as real ones are.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import psutil

from mixcl_dist.data_shards.format.codec import DESCRIPTION, digest
from mixcl_dist.data_shards.format.fingerprint import SIZE
from mixcl_dist.data_shards.format.manifest import (
    CASES_FILE,
    CLASSES_FILE,
    FINGERPRINTS_FILE,
    FORMAT_VERSION,
    HU_BINS,
    CaseRecord,
    Manifest,
    ShardRecord,
    annotated_by_dataset,
    sample_key,
    spacing_histogram,
    table_digest,
)
from mixcl_dist.data_shards.format.shard import parse_index

PATCHES, CASES, PER_SHARD, CLASSES = 1_000_000, 40_000, 256, 117


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for cost.json")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    tables = made_up_tables(rng)
    manifest = made_up_manifest(rng, tables)
    result = {"patches": PATCHES, "cases": CASES, "manifest": manifest_cost(manifest, options.out)}
    result["indices"] = index_cost(rng, manifest)
    result["tables"] = {name: table_cost(manifest, name, table) for name, table in tables.items()}
    (options.out / "cost.json").write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def made_up_tables(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        CASES_FILE: rng.integers(0, CASES, PATCHES).astype("<u4"),
        CLASSES_FILE: rng.integers(0, 256, (PATCHES, -(-CLASSES // 8))).astype("u1"),
        FINGERPRINTS_FILE: rng.integers(-127, 128, (CASES, SIZE)).astype("i1"),
    }


def made_up_manifest(rng: np.random.Generator, tables: dict[str, np.ndarray]) -> Manifest:
    classes = tuple(f"organ_number_{number}" for number in range(CLASSES))
    cases = tuple(
        CaseRecord(
            name=f"ct-{rng.bytes(8).hex()}",
            dataset=f"dataset{number % 20}",
            split="training",
            reliable=classes[: number % 20],
            labelled=True,
            patches=PATCHES // CASES,
            spacing_mm=(0.8, 0.8, 1.5),
            source_digest=rng.bytes(16).hex(),
            label_digest=rng.bytes(16).hex(),
            shows_face=False,
        )
        for number in range(CASES)
    )
    shards = tuple(
        ShardRecord(f"shard-{number:06d}.tar", PER_SHARD, 268_435_456, rng.bytes(8).hex(), rng.bytes(8).hex())
        for number in range(PATCHES // PER_SHARD)
    )
    # A million is not a multiple of 256: the last shard has the rest.
    last = ShardRecord(f"shard-{len(shards):06d}.tar", PATCHES % PER_SHARD, 67_108_864, "0" * 16, "0" * 16)
    return Manifest(
        version=FORMAT_VERSION,
        patch_size=(96, 96, 96),
        spacing_mm=None,
        classes=classes,
        cases=cases,
        shards=(*shards, last),
        codec=DESCRIPTION,
        hu_histogram=(10**9,) * HU_BINS[2],
        spacing_histogram=spacing_histogram([case.spacing_mm for case in cases]),
        annotated=annotated_by_dataset(cases),
        settings={},
        versions={},
        tables={name: table_digest(table) for name, table in tables.items()},
    )


def manifest_cost(manifest: Manifest, folder: Path) -> dict[str, float]:
    folder.mkdir(parents=True, exist_ok=True)
    manifest.save(folder)
    content = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    before = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    read = Manifest.parse(content, "manifest.json")
    seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    assert read.digest == manifest.digest
    return {
        "bytes": len(content),
        "seconds": seconds,
        "seconds_digest": time.perf_counter() - begin,
        "memory_bytes": psutil.Process().memory_info().rss - before,
    }


def index_cost(rng: np.random.Generator, manifest: Manifest) -> dict[str, float]:
    """One index, times the number of shards; a reader holds those of the shards that it is at."""
    samples, position = {}, 0
    for _ in range(PER_SHARD):
        case = manifest.cases[int(rng.integers(CASES))].name
        members = {}
        for member, size in (("ct.b2", 960_000), ("seg.b2", 2_000), ("json", 800)):
            size = int(size * rng.uniform(0.8, 1.2))
            members[member] = [position + 512, size, rng.bytes(8).hex()]
            position += 512 + size + -size % 512
        samples[sample_key(case, int(rng.integers(1000)))] = members
    index = {"version": 1, "bytes": position + 1024, "xxh3": rng.bytes(8).hex(), "samples": samples}
    content = json.dumps(index, separators=(",", ":")).encode()
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        parse_index(content, "index")
        digest(content)
        times.append(time.perf_counter() - begin)
    shards = len(manifest.shards)
    return {"bytes": len(content) * shards, "seconds": float(np.median(times)) * shards, "seconds_of_one": min(times)}


def table_cost(manifest: Manifest, name: str, table: np.ndarray) -> dict[str, float]:
    content = io.BytesIO()
    np.save(content, table)
    begin = time.perf_counter()
    manifest.check_table(name, content.getvalue(), name)
    return {"bytes": len(content.getvalue()), "seconds": time.perf_counter() - begin}


def show(result: dict) -> None:
    rows = {"manifest.json": result["manifest"], "all indices": result["indices"], **result["tables"]}
    print(f"a million patches of {result['cases']} cases")
    for name, row in rows.items():
        print(f"{name:<24}{row['bytes'] / 1e6:>8.1f} MB read in {row['seconds']:>7.3f} s")
    manifest, index = result["manifest"], result["indices"]
    print(f"manifest: {manifest['memory_bytes'] / 1e6:.0f} MB of memory, digest in {manifest['seconds_digest']:.3f} s")
    print(f"one index: {1e3 * index['seconds_of_one']:.2f} ms")


if __name__ == "__main__":
    main()
