"""Bytes per voxel and patches decoded a second of the codecs that shards might use, on real 96³ patches.

    OMP_NUM_THREADS=1 python benchmarks/shards/codec.py --ct ../shared/ct --out benchmarks/results/shards

Every patch that `mixcl shards build` cuts from the scans counts in "all"; most of OpenKBP's voxels are air, so the
patches that are mostly body are counted by themselves as well. Decoding is measured in rounds that go through all
codecs, so that a busy moment hits all of them.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import blosc2
import numpy as np
import pcodec
from pcodec import standalone

from mixcl_dist.data_shards.building.settings import BuildConfig
from mixcl_dist.data_shards.building.spool import cut_patches, quantised
from mixcl_dist.data_shards.catalogue import merged
from mixcl_dist.data_shards.format.codec import CT_MEMBERS, SEG_MEMBER, decode_into, encode
from mixcl_dist.data_shards.sources import open_source, read_case
from mixcl_dist.data_shards.volume import AIR_HU, crop_to_body

EDGE = 96
CONFIG = BuildConfig(patch_size=(EDGE, EDGE, EDGE))
SOURCES = ("openkbp", "torso", "sarcoma/STS_001/nifti", "sarcoma/STS_002/nifti")
BODY_SHARE, BODY_PATCHES, AIR_PATCHES = 0.5, 24, 24
"""A patch is "body" with at least this share of voxels above air; decoding is timed on so many patches of either."""

Encode = Callable[[np.ndarray], bytes]
Decode = Callable[[bytes, np.ndarray], None]


def blosc(codec: blosc2.Codec, filter_: blosc2.Filter, level: int = 5) -> tuple[Encode, Decode]:
    def compress(array: np.ndarray) -> bytes:
        settings = {"codec": codec, "clevel": level, "filters": [filter_], "filters_meta": [0]}
        return blosc2.compress2(array, **settings, typesize=array.itemsize, blocksize=1 << 18, nthreads=1)

    return compress, lambda payload, out: blosc2.decompress2(payload, dst=out, nthreads=1)


def npz(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, hu=array)
    return content.getvalue()


def from_npz(payload: bytes, out: np.ndarray) -> None:
    out[:] = np.load(io.BytesIO(payload))["hu"]


def pco(level: int) -> tuple[Encode, Decode]:
    config = pcodec.ChunkConfig(compression_level=level)

    def decompress(payload: bytes, out: np.ndarray) -> None:
        standalone.simple_decompress_into(payload, out.reshape(-1))

    return lambda array: standalone.simple_compress(array.reshape(-1), config), decompress


def ours(member: str, step: int = 0) -> tuple[Encode, Decode]:
    """As shards have it, checks of the header included."""
    return lambda array: encode(member, quantised(array, step)), lambda payload, out: decode_into(member, payload, out)


LZ4, LZ4HC, ZSTD = blosc2.Codec.LZ4, blosc2.Codec.LZ4HC, blosc2.Codec.ZSTD
NONE, SHUFFLE, BITSHUFFLE = blosc2.Filter.NOFILTER, blosc2.Filter.SHUFFLE, blosc2.Filter.BITSHUFFLE
CODECS: dict[str, tuple[Encode, Decode]] = {
    "npz": (npz, from_npz),
    "blosc2 zstd-3, no filter": blosc(ZSTD, NONE, 3),
    "blosc2 lz4-5 bitshuffle": blosc(LZ4, BITSHUFFLE),
    "blosc2 lz4hc-5 bitshuffle": blosc(LZ4HC, BITSHUFFLE),
    "blosc2 lz4hc-9 shuffle": blosc(LZ4HC, SHUFFLE, 9),
    "blosc2 zstd-5 shuffle": blosc(ZSTD, SHUFFLE),
    "pcodec 4": pco(4),
    "fast: blosc2 lz4hc-5 shuffle": ours(CT_MEMBERS["fast"]),
    "fast, 2 HU steps": ours(CT_MEMBERS["fast"], 2),
    "small: pcodec 8": ours(CT_MEMBERS["small"]),
    "small, 2 HU steps": ours(CT_MEMBERS["small"], 2),
}
FAST, SMALL = "fast: blosc2 lz4hc-5 shuffle", "small: pcodec 8"
"""These encode every patch of every scan; the others only those that are timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ct", type=Path, required=True, help="folder of real CT")
    parser.add_argument("--out", type=Path, required=True, help="folder for codec.json")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    whole, chosen = stored_sizes(options.ct)
    groups = {name: measure(patches, options.rounds) for name, patches in chosen.items()}
    result = {"edge": EDGE, "every_patch": whole, "timed": groups}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "codec.json").write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def stored_sizes(ct: Path) -> tuple[dict, dict[str, list[np.ndarray]]]:
    """Sizes of all patches of all scans in both profiles, and the patches to be timed, of different scans."""
    voxels, sizes = {"all": 0, "body": 0, "labels": 0}, {}
    reservoir: dict[str, list[np.ndarray]] = {"body": [], "mostly air": []}
    rng = np.random.default_rng(0)
    counts = {"scans": 0, "patches": 0, "body patches": 0}
    for patch, label in every_patch(ct, counts):
        share = float((patch > AIR_HU + 24).mean())
        groups = ["all", "body"] if share >= BODY_SHARE else ["all"]
        for group in groups:
            voxels[group] += patch.size
            for name in (FAST, SMALL):
                sizes.setdefault((group, name), []).append(len(CODECS[name][0](patch)))
        if label is not None:
            voxels["labels"] += label.size
            sizes.setdefault(("labels", SEG_MEMBER), []).append(len(encode(SEG_MEMBER, label)))
        counts["body patches"] += len(groups) - 1
        kind, limit = ("body", BODY_PATCHES) if len(groups) == 2 else ("mostly air", AIR_PATCHES)
        _keep(reservoir[kind], patch, limit, counts["patches"], rng)
    table = {f"{group}, {name}": sum(found) / voxels[group] for (group, name), found in sizes.items()}
    return counts | {"bytes_per_voxel": table}, reservoir


def _keep(held: list[np.ndarray], patch: np.ndarray, limit: int, seen: int, rng: np.random.Generator) -> None:
    """An even draw of `limit` patches out of as many as come."""
    if len(held) < limit:
        held.append(patch)
    elif (place := int(rng.integers(seen))) < limit:
        held[place] = patch


def every_patch(ct: Path, counts: dict[str, int]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    sources = [open_source(ct / name) for name in SOURCES]
    catalogue = merged(source.classes for source in sources)
    for case in (case for source in sources for case in source.cases):
        if case.files[0].name.startswith("mask"):
            continue
        counts["scans"] += 1
        for patch in cut_patches(crop_to_body(read_case(case, catalogue), CONFIG.body_margin_mm), CONFIG):
            counts["patches"] += 1
            label = None if patch.label is None else np.ascontiguousarray(patch.label)
            yield np.ascontiguousarray(patch.hu), label


def measure(patches: list[np.ndarray], rounds: int) -> dict:
    payloads = {name: [compress(patch) for patch in patches] for name, (compress, _) in CODECS.items()}
    rates: dict[str, list[float]] = {name: [] for name in CODECS}
    out = np.empty_like(patches[0])
    for _ in range(rounds):
        for name, (_, decompress) in CODECS.items():
            begin = time.perf_counter()
            for payload in payloads[name]:
                decompress(payload, out)
            rates[name].append(len(patches) / (time.perf_counter() - begin))
    for name, (_, decompress) in CODECS.items():
        decompress(payloads[name][-1], out)
        error = np.abs(out.astype(int) - patches[-1]).max()
        assert error <= (1 if "steps" in name else 0), f"{name} is off by {error} HU"
    return {
        "patches": len(patches),
        "codecs": {
            name: {
                "bytes_per_voxel": sum(map(len, payloads[name])) / (len(patches) * patches[0].size),
                "patches_per_second": {
                    "median": float(np.median(rates[name])), "min": min(rates[name]), "max": max(rates[name])
                },
            }
            for name in CODECS
        },
    }  # fmt: skip


def show(result: dict) -> None:
    every = result["every_patch"]
    print(f"{every['scans']} scans, {every['patches']} patches of {EDGE}³, {every['body patches']} of them mostly body")
    for name, value in every["bytes_per_voxel"].items():
        print(f"  {name:<40}{value:8.4f} bytes/voxel")
    for group, measured in result["timed"].items():
        print(f"\n{measured['patches']} patches, {group:<18}{'bytes/voxel':>16}{'decoded/s':>12}{'min':>8}{'max':>8}")
        for name, row in measured["codecs"].items():
            rate = row["patches_per_second"]
            speeds = f"{rate['median']:>12.0f}{rate['min']:>8.0f}{rate['max']:>8.0f}"
            print(f"  {name:<36}{row['bytes_per_voxel']:>10.4f}{speeds}")


if __name__ == "__main__":
    main()
