"""Where to cut a volume, and the cut."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from mixcl_dist.data_shards.volume import AIR_HU, BODY_HU, Volume


def pad_to(volume: Volume, size: Sequence[int]) -> Volume:
    """`volume` with air (-1024 HU, label 0) appended at the far end of every axis shorter than `size`.

    No voxel moves, so the affine stays.
    """
    missing = [(0, max(0, wanted - length)) for wanted, length in zip(size, volume.hu.shape, strict=True)]
    if not any(after for _, after in missing):
        return volume
    hu = np.pad(volume.hu, missing, constant_values=AIR_HU)
    label = None if volume.label is None else np.pad(volume.label, missing)
    return dataclasses.replace(volume, hu=hu, label=label)


def patch_origins(
    volume: Volume, patch_size: Sequence[int], overlap: float, min_body_fraction: float
) -> list[tuple[int, int, int]]:
    """First voxels of the patches that cover `volume`, without those that hold almost only air.

    Along each axis the first patch begins at 0, the last ends at the border, and the rest lie evenly between, each
    sharing at least `overlap` of its edge with the next; an axis shorter than a patch has one, which reaches beyond
    (see `pad_to`). `min_body_fraction` is the smallest share above -500 HU of the volume's own voxels in a patch:
    what it is padded with is no air of the scan.
    """
    x, y, z = (_axis_starts(length, edge, overlap) for length, edge in zip(volume.hu.shape, patch_size, strict=True))
    body = volume.hu > BODY_HU
    boxes = ((origin, body[_box(origin, patch_size)]) for origin in product(x, y, z))
    return [origin for origin, inside in boxes if np.count_nonzero(inside) >= min_body_fraction * inside.size]


def cut(volume: Volume, origin: Sequence[int], patch_size: Sequence[int]) -> Volume:
    """The patch whose first voxel is `origin`, with the affine that puts it where it was."""
    box = _box(origin, patch_size)
    affine = volume.affine.copy()
    affine[:3, 3] += volume.affine[:3, :3] @ origin
    label = None if volume.label is None else volume.label[box]
    return Volume(volume.hu[box], affine, label)


def _axis_starts(length: int, edge: int, overlap: float) -> list[int]:
    beyond = max(0, length - edge)
    count = 1 + math.ceil(beyond / max(1, math.floor(edge * (1 - overlap))))
    return [int(start) for start in np.linspace(0, beyond, count).round()]


def _box(origin: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + edge) for first, edge in zip(origin, size, strict=True))
