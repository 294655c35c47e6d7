"""Kernels and strides of a network's levels, from the voxels' spacing, as nnU-Net plans them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mixcl_dist.settings import NetworkConfig

TOO_COARSE = 2.0
"""An axis whose spacing is at least so many times the finest one is left as it is until the others have caught up."""


class Levels(NamedTuple):
    """Of every level, from the finest to the bottleneck, a number for each axis."""

    kernels: list[list[int]]
    strides: list[list[int]]
    """With which a level is reached from the one before; 1 for the first."""


def levels(config: NetworkConfig) -> Levels:
    """3 and 2, but 1 and 1 along an axis that is too coarse at that level; without a spacing none is. The bottleneck
    has kernels of 3 in any case."""
    spacing = np.array(config.kernel_spacing_mm or (1.0, 1.0, 1.0))
    kernels, strides = [], [[1, 1, 1]]
    for _ in config.filters[1:]:
        near = spacing / spacing.min() < TOO_COARSE
        kernels.append([3 if one else 1 for one in near])
        strides.append([2 if one else 1 for one in near])
        spacing = spacing * strides[-1]
    return Levels([*kernels, [3, 3, 3]], strides)


def divisor(config: NetworkConfig) -> tuple[int, int, int]:
    """What the edges of an image must be multiples of."""
    x, y, z = (int(n) for n in np.prod(levels(config).strides, axis=0))
    return x, y, z


def multiples(step: Sequence[int]) -> str:
    """A divisor in a message."""
    if len(set(step)) == 1:
        return f"every edge must be a multiple of {step[0]}"
    return f"edges must be multiples of {' x '.join(map(str, step))}"
