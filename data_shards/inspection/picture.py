"""Patches of many cases on one sheet, to see at a glance whether shards hold what they should."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.data_shards.format.codec import CT_MEMBERS, SEG_MEMBER, decode
from mixcl_dist.data_shards.format.manifest import CASES_FILE, CLASSES_FILE, Manifest
from mixcl_dist.data_shards.format.shard import read_index, read_sample
from mixcl_dist.data_shards.storage.publishing import publish
from mixcl_dist.data_shards.volume import BODY_HU

PICTURES, COLUMNS = 24, 6
COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe", "#e6beff")
"""Of labels; after the last the first comes again."""


class _Patch(NamedTuple):
    key: str
    hu: np.ndarray
    label: np.ndarray | None
    spacing_mm: tuple[float, float, float]


def contact_sheet(folder: Path, picture: Path, window_hu: Sequence[float]) -> None:
    """Draw an axial slice, in the middle of the tissue, of up to 24 patches, each of another case, to a PNG.

    The patient's right is on the left, anterior above. HU from `window_hu[0]` to `window_hu[1]` run from black to
    white, labels are outlined, and every picture is as wide as its patch in mm. Raises `ManifestError` or
    `ShardError` for shards that are not whole.
    """
    manifest = Manifest.load(folder)
    patches = [_read(folder, manifest, sample) for sample in _spread(folder, manifest)]
    rows = math.ceil(len(patches) / COLUMNS)
    figure = Figure(figsize=(2.2 * COLUMNS, 2.55 * rows + 0.7), facecolor="white", layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    seen: set[int] = set()
    for axis, patch in zip(axes, patches, strict=False):
        seen |= _draw(axis, patch, window_hu)
    for axis in axes:
        axis.set_axis_off()
    low, high = window_hu
    count = f"{len(patches)} of {manifest.patches} patches"
    figure.suptitle(
        f"{count}, {len(manifest.cases)} cases; window {low:g} to {high:g} HU; axial, R on the left", fontsize=9
    )
    lines = [Line2D([], [], color=_colour(label), label=_name(manifest, label)) for label in sorted(seen)]
    if lines:
        figure.legend(handles=lines, loc="outside lower center", ncols=8, fontsize=7, frameon=False)
    with publish(Path(picture)) as file:
        FigureCanvasAgg(figure).print_png(file)


def _spread(folder: Path, manifest: Manifest) -> list[int]:
    """Numbers of the samples to be shown: of cases evenly through the list, that patch with the most classes in it."""
    case, present = (manifest.read_table(folder, name) for name in (CASES_FILE, CLASSES_FILE))
    classes = np.unpackbits(present, axis=1).sum(axis=1)
    chosen = np.unique(np.linspace(0, len(manifest.cases) - 1, PICTURES).round().astype(int))
    richest = []
    for number in chosen:
        samples = np.flatnonzero(case == number)
        # Without labels all are equal: take one that the seed of the shuffle has put in the middle.
        order = np.roll(samples, len(samples) // 2)
        richest.append(int(order[classes[order].argmax()]))
    return richest


def _read(folder: Path, manifest: Manifest, sample: int) -> _Patch:
    first = manifest.first_of_shard
    shard = int(np.searchsorted(first, sample, side="right")) - 1
    path = Path(folder) / manifest.shards[shard].file
    key, members = list(read_index(path).samples.items())[sample - first[shard]]
    stored = read_sample(path, key, members)
    ct = next(member for member in CT_MEMBERS.values() if member in stored)
    hu = decode(stored[ct], manifest.patch_size, np.int16, ct)
    label = decode(stored[SEG_MEMBER], manifest.patch_size, np.uint8, SEG_MEMBER) if SEG_MEMBER in stored else None
    return _Patch(key, hu, label, json.loads(stored["json"])["spacing_mm"])


def _draw(axis, patch: _Patch, window_hu: Sequence[float]) -> set[int]:
    """Returns the labels that are drawn."""
    tissue = np.flatnonzero((patch.hu > BODY_HU).any(axis=(0, 1)))
    middle = tissue[len(tissue) // 2] if tissue.size else patch.hu.shape[2] // 2  # a short volume is padded behind
    x, y, z = patch.spacing_mm
    width, height = x * patch.hu.shape[0], y * patch.hu.shape[1]
    low, high = window_hu
    place = {"extent": (0, width, 0, height), "origin": "lower"}
    axis.imshow(patch.hu[::-1, :, middle].T, cmap="gray", vmin=low, vmax=high, aspect="equal", **place)
    axis.set_title(f"{patch.key}\n{x:.3g} × {y:.3g} × {z:.3g} mm", fontsize=6)
    if patch.label is None:
        return set()
    cut = patch.label[::-1, :, middle].T
    labels = {int(label) for label in np.unique(cut) if label}
    for label in labels:
        axis.contour(cut == label, [0.5], colors=[_colour(label)], linewidths=0.8, **place)
    return labels


def _colour(label: int) -> str:
    return "#808080" if label == IGNORED else COLOURS[(label - 1) % len(COLOURS)]


def _name(manifest: Manifest, label: int) -> str:
    return "ignored" if label == IGNORED else manifest.classes[label - 1]
