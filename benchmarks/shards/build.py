"""Volumes a minute that one core turns into shards, beside a plain MONAI loop that only loads, turns and saves.

    OMP_NUM_THREADS=1 python benchmarks/shards/build.py --ct ../shared/ct --out benchmarks/results/shards

Ours also crops, cuts overlapping patches, compresses, digests, fingerprints, looks for faces, shuffles over all volumes
and writes index, tables and manifest. Rounds go through all contestants, each in this process on one thread.
"LZ4HC alone" compresses the patches of 48³ that ours writes, and does nothing else: no build with these bytes is
faster. Times are of the thread's CPU, so that neither other work nor a slow disk is counted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation

from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.building.processes import in_this_process
from mixcl_dist.data_shards.building.settings import BuildConfig
from mixcl_dist.data_shards.building.spool import cut_patches
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.format.codec import CT_MEMBERS, encode
from mixcl_dist.data_shards.sources import Case, open_source, read_case
from mixcl_dist.data_shards.volume import crop_to_body

SHARED_CT = Path(__file__).resolve().parents[3] / "shared" / "ct"
EVERY_OPENKBP = {False: 8, True: 60}
"""By --quick."""
PATCHES = {"ours, 96³": (96, 96, 96), "ours, 48³": (48, 48, 48)}
SAVE = {"MONAI, np.savez": np.savez, "MONAI, np.savez_compressed": np.savez_compressed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ct", type=Path, default=SHARED_CT, help="folder of real CT (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for build.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few scans, 3 rounds; no figures to quote")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.ct, Path(folder), 3 if options.quick else options.rounds, EVERY_OPENKBP[options.quick])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "build.json").write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def measure(ct: Path, folder: Path, rounds: int, every: int) -> dict:
    cases = [case for name in ("openkbp", "torso") for case in open_source(ct / name).cases]
    cases = [case for n, case in enumerate(cases) if n % every == 0 or case.dataset == "torso"]
    listed = folder / "cases" / "dataset.json"
    listed.parent.mkdir()
    listed.write_text(json.dumps({"labels": {}, "training": [{"image": str(case.files[0])} for case in cases]}))
    contestants: dict[str, Callable[[Path], None]] = {
        **{name: lambda out, save=save: monai_loop(cases, out, save) for name, save in SAVE.items()},
        **{name: lambda out, size=size: ours(listed, out, size) for name, size in PATCHES.items()},
        "LZ4HC alone, 48³": compression_alone(listed),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    written = {}
    for _ in range(rounds + 1):  # the first round warms up
        for name, run in contestants.items():
            out = folder / "out"
            begin = time.thread_time()
            run(out)
            seconds[name].append(time.thread_time() - begin)
            written[name] = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
            shutil.rmtree(out)
    base = np.array(seconds["MONAI, np.savez"][1:])
    return {
        "volumes": len(cases),
        "voxels": int(sum(np.prod(volume_shape(case)) for case in cases)),
        "rounds": rounds,
        "contestants": {
            name: {
                "volumes_per_minute": spread(60 * len(cases) / np.array(times[1:])),
                "times_as_fast_as_np_savez": spread(base / np.array(times[1:])),
                "megabytes": written[name] / 1e6,
            }
            for name, times in seconds.items()
        },
    }


def volume_shape(case: Case) -> tuple[int, ...]:
    return LoadImage(image_only=True)(case.files[0]).shape


def monai_loop(cases: list[Case], out: Path, save: Callable) -> None:
    out.mkdir()
    load = Compose([LoadImage(image_only=True), EnsureChannelFirst(), Orientation(axcodes="RAS", labels=None)])
    for case in cases:
        image = load(case.files[0])
        save(out / f"{case.name}.npz", image=image.numpy().astype(np.int16), affine=image.affine.numpy())


def ours(listed: Path, out: Path, size: tuple[int, int, int]) -> None:
    result = build([listed], out, BuildConfig(patch_size=size), run=in_this_process)
    assert len(result.manifest.cases) > 0


def compression_alone(listed: Path) -> Callable[[Path], None]:
    config = BuildConfig()
    patches = []
    for case in open_source(listed).cases:
        volume = crop_to_body(read_case(case, Catalogue(())), config.body_margin_mm)
        patches += [np.ascontiguousarray(patch.hu) for patch in cut_patches(volume, config)]

    def run(out: Path) -> None:
        out.mkdir()
        for number, patch in enumerate(patches):
            (out / str(number)).write_bytes(encode(CT_MEMBERS[config.codec], patch))

    return run


def spread(values: np.ndarray) -> dict[str, float]:
    return {
        "median": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
        "samples": values.tolist(),
    }


def show(result: dict) -> None:
    size = f"{result['volumes']} volumes, {result['voxels'] / 1e6:.0f} million voxels"
    print(f"{size}, {result['rounds']} rounds, one core")
    print(f"{'':<30}{'volumes/min':>12}{'min':>8}{'max':>8}{'x savez':>9}{'min':>7}{'max':>7}{'MB':>8}")
    for name, row in result["contestants"].items():
        rate, ratio = row["volumes_per_minute"], row["times_as_fast_as_np_savez"]
        rates = f"{rate['median']:>12.0f}{rate['min']:>8.0f}{rate['max']:>8.0f}"
        print(
            f"{name:<30}{rates}{ratio['median']:>9.2f}{ratio['min']:>7.2f}{ratio['max']:>7.2f}{row['megabytes']:>8.1f}"
        )


if __name__ == "__main__":
    main()
