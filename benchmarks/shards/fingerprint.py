"""How far fingerprints of one scan lie apart after common changes, and how far those of different patients.

python benchmarks/shards/fingerprint.py --ct ../shared/ct --out benchmarks/results/shards
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mixcl_dist.data_shards.catalogue import merged
from mixcl_dist.data_shards.format.fingerprint import NEAR, fingerprint, near_pairs
from mixcl_dist.data_shards.sources import open_source, read_case
from mixcl_dist.data_shards.volume import AIR_HU, Volume, resample

CHANGED_EVERY = {"openkbp": 4, "torso": 1}
"""Of each data set, every so manyth scan is changed; all are compared with each other."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ct", type=Path, required=True, help="folder of real CT")
    parser.add_argument("--out", type=Path, required=True, help="folder for fingerprint.json")
    options = parser.parse_args()
    names, prints, same, seconds = _measure(options.ct)
    # A limit of 2, the largest distance, lets every pair through.
    pairs = [(d, names[i], names[j]) for i, j, d in near_pairs(prints, prints, 2.1) if i < j]
    found = {
        "cases": len(names),
        "pairs_of_patients": len(pairs),
        "near": NEAR,
        "patients": _summary([distance for distance, *_ in pairs]),
        "closest_patients": sorted(pairs)[:5],
        "same_scan": {change: _summary(distances) for change, distances in same.items()},
        "seconds_per_scan": float(np.median(seconds)),
        "pairs_per_second": _search_speed(prints),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fingerprint.json").write_text(json.dumps(found, indent=1) + "\n")
    _show(found)


def _measure(ct: Path) -> tuple[list[str], np.ndarray, dict[str, list[float]], list[float]]:
    """Names, fingerprints, the distances of changed scans to their originals, and how long a fingerprint took."""
    sources = [open_source(ct / name) for name in CHANGED_EVERY]
    catalogue = merged(source.classes for source in sources)
    names, prints, seconds, same = [], [], [], defaultdict(list)
    for source, every in zip(sources, CHANGED_EVERY.values(), strict=True):
        for number, case in enumerate(source.cases):
            volume = read_case(case, catalogue)
            begin = time.perf_counter()
            prints.append(fingerprint(volume))
            seconds.append(time.perf_counter() - begin)
            names.append(case.name)
            if number % every == 0:
                for change, changed in changes(volume, np.random.default_rng(number)):
                    ((_, _, distance),) = near_pairs(prints[-1][None], fingerprint(changed)[None], 2.1)
                    same[change].append(distance)
    return names, np.array(prints), dict(same), seconds


def changes(volume: Volume, rng: np.random.Generator) -> Iterator[tuple[str, Volume]]:
    """What a scan goes through on its way into another data set."""
    hu, affine = volume.hu, volume.affine
    noise = rng.normal(0, 20, hu.shape)

    def of(values: np.ndarray) -> Volume:
        return Volume(np.clip(np.rint(values), AIR_HU, 32767).astype(np.int16), affine)

    yield "noise of 20 HU", of(hu + noise)
    yield "clipped to -160 to 240 HU", of(np.clip(hu, -160, 240))
    yield "clipped, then noise", of(np.clip(hu, -160, 240) + noise)
    for spacing in ((1.5, 1.5, 1.5), (3.0, 3.0, 3.0), (2.0, 2.0, 5.0)):
        yield "resampled to " + " x ".join(f"{s:g}" for s in spacing) + " mm", resample(volume, spacing)
    low, high = rng.integers(0, 6, (2, 3))
    inside = tuple(slice(a, n - b) for a, b, n in zip(low, high, hu.shape, strict=True))
    yield "up to 5 voxels cut off each side", Volume(np.ascontiguousarray(hu[inside]), affine)
    yield "3 slices cut off either end", Volume(np.ascontiguousarray(hu[:, :, 3:-3]), affine)
    yield "10 voxels of air around", Volume(np.pad(hu, 10, constant_values=AIR_HU), affine)
    cut = Volume(of(hu + noise).hu[2:-2, 2:-2, 3:-3], affine)
    small = resample(cut, (2.0, 2.0, 3.0))
    yield "noise, cut, resampled and clipped", Volume(np.clip(small.hu, -200, 300), small.affine)


def _search_speed(prints: np.ndarray) -> float:
    """Pairs that one core compares in a second, at the limit that is used."""
    many = np.concatenate([np.roll(prints, shift, axis=1) for shift in range(10)])
    begin = time.perf_counter()
    list(near_pairs(many, prints))
    return len(many) * len(prints) / (time.perf_counter() - begin)


def _summary(distances: list[float]) -> dict[str, float]:
    d = np.array(distances)
    quantiles = {"min": 0, "0.1 %": 0.001, "1 %": 0.01, "median": 0.5, "95 %": 0.95, "99 %": 0.99, "max": 1}
    shares = {"n": len(d), "nearer": float((d < NEAR).mean())}
    return shares | {name: round(float(np.quantile(d, q)), 4) for name, q in quantiles.items()}


def _show(found: dict) -> None:
    print(f"{found['cases']} scans, {found['pairs_of_patients']} pairs of patients, near is < {found['near']}")
    rows = {"different patients": found["patients"]} | found["same_scan"]
    print(f"{'':<36}{'n':>7}{'< near':>9}{'min':>8}{'1 %':>8}{'median':>8}{'95 %':>8}{'max':>8}")
    for name, row in rows.items():
        cells = "".join(f"{row[column]:>8.4f}" for column in ("min", "1 %", "median", "95 %", "max"))
        print(f"{name:<36}{row['n']:>7}{row['nearer']:>9.2%}{cells}")
    print("closest patients:", "; ".join(f"{one}, {other}: {d:.4f}" for d, one, other in found["closest_patients"]))
    print(f"{found['seconds_per_scan']:.3f} s a scan; {found['pairs_per_second']:.3g} pairs a second")


if __name__ == "__main__":
    main()
