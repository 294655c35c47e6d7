"""What a set of shards holds, counted up, and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mixcl_dist.data_shards.format.manifest import HU_BINS, SPACING_EDGES_MM, CaseRecord, Manifest

BAR = 40
"""Characters of a histogram's longest bar."""


def inspect(folder: Path) -> dict[str, Any]:
    """The manifest of `folder` counted up, as plain values; raises `ManifestError`."""
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
        "bytes_per_voxel": stored / max(1, manifest.patches * math.prod(manifest.patch_size)),
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
                "faces": sum(case.shows_face for case in cases),
                "patches": sum(case.patches for case in cases),
            }
            for (dataset, split), cases in groups.items()
        ],
        "annotated": manifest.annotated,
        "spacing_histogram": manifest.spacing_histogram,
        "hu_histogram": manifest.hu_histogram,
        "codec": manifest.codec,
        "settings": manifest.settings,
        "versions": manifest.versions,
    }


def table(held: Mapping[str, Any]) -> str:
    """What `inspect` counted, to be read on a terminal."""
    return "\n".join([*_head(held), *_datasets(held), *_classes(held), *_spacing(held), *_hu(held), *_origin(held)])


def _head(held: Mapping[str, Any]) -> Iterator[str]:
    yield f"{held['cases']} cases, {held['patches']} patches in {held['shards']} shards, digest {held['digest']}"
    codecs = "; ".join(f"{member}: {how}" for member, how in held["codec"].items())
    yield f"{held['bytes'] / 2**20:.1f} MiB, {held['bytes_per_voxel']:.3f} bytes/voxel; {codecs}"
    axes = [f"{low:.3g}" if high - low < 1e-6 else f"{low:.3g}–{high:.3g}" for low, high in held["spacing_range_mm"]]
    yield f"patches of {'×'.join(map(str, held['patch_size']))} voxels, spacing {', '.join(axes)} mm"


def _datasets(held: Mapping[str, Any]) -> Iterator[str]:
    columns = ("dataset", "split", "cases", "labelled", "faces", "patches")
    rows = [columns, *([part[column] for column in columns] for part in held["datasets"])]
    yield from ["", *_aligned(rows, left=2)]


def _classes(held: Mapping[str, Any]) -> Iterator[str]:
    datasets = list(held["annotated"])
    counts = ([held["annotated"][dataset].get(name, 0) for dataset in datasets] for name in held["classes"])
    numbered = zip(held["classes"], counts, strict=True)
    rows = [
        ("label", "annotated cases", *datasets),
        *((label, name, *row) for label, (name, row) in enumerate(numbered, 1)),
    ]
    yield from ["", *_aligned(rows, left=2)]


def _spacing(held: Mapping[str, Any]) -> Iterator[str]:
    yield "\nspacing (mm), cases along X, Y, Z"
    ranges = [f"{low:g} to {high:g}" for low, high in pairwise(SPACING_EDGES_MM)]
    rows = list(zip(ranges, *held["spacing_histogram"], strict=True))
    yield from _aligned([row for row in rows if any(row[1:])], left=1)


def _hu(held: Mapping[str, Any]) -> Iterator[str]:
    """Four bins of the manifest to a line."""
    first, last, bins = HU_BINS
    counts = [sum(held["hu_histogram"][bin_ : bin_ + 4]) for bin_ in range(0, bins, 4)]
    step, total = (last - first) // len(counts), max(1, sum(counts))
    longest = max(1, *counts)
    yield "\nHU, share of the voxels of all volumes, cropped to the body"
    for number, count in enumerate(counts):
        low = first + number * step
        yield f"{low:>6} to {low + step - 1:>5}  {count / total:>7.2%}  {'█' * round(BAR * count / longest)}".rstrip()


def _origin(held: Mapping[str, Any]) -> Iterator[str]:
    yield "\nbuilt with " + ", ".join(f"{name}={value}" for name, value in held["settings"].items())
    yield "by " + ", ".join(f"{package} {version}" for package, version in held["versions"].items())


def _aligned(rows: Iterable[Sequence[Any]], left: int) -> Iterator[str]:
    """Columns as wide as their widest entry, the first `left` of them flush left."""
    texts = [[str(entry) for entry in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        flush = [text.ljust(width) for text, width in zip(row[:left], widths, strict=False)]
        flush += [text.rjust(width) for text, width in zip(row[left:], widths[left:], strict=True)]
        yield "  ".join(flush).rstrip()
