"""How the Triton kernels are cut and launched: a static table by architecture, kernel, dtype and width.

Every entry is built ahead of time for its architecture in the tests, without a spilled register. The stage `tiles` of
benchmarks/gpu times candidates on a card, each kernel by itself, and proposes entries.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mixcl_dist.kernels.implementation import is_interpreted
from mixcl_dist.kernels.index import SPECIAL


class Tile(NamedTuple):
    """How one kernel is cut and launched."""

    rows: int
    columns: int
    warps: int
    stages: int  #: depth of the software pipeline
    step: int = 0  #: rows are streamed in steps of so many features; 0: they are loaded whole, once
    out: int = 0  #: features of the gradient that one program finishes; 0: all
    triangle: bool = False  #: of "forward": whole pairs of blocks go through triangle.py
    polynomial: int = 0  #: of "triangle": one exponential in so many (2, 4, 8) is a polynomial; 0: none
    descriptor: bool = False  #: of "triangle": columns are loaded by tensor descriptors (TMA)


class Launch(NamedTuple):
    """A tile, fitted to rows of a certain width and dtype."""

    tile: Tile
    width: int  #: features, padded
    head: int  #: features that are loaded together: all of them as head and tail, or a step
    tail: int
    precision: str  #: of float32 products, as Triton names it

    @property
    def out(self) -> int:
        return self.tile.out or self.width

    def options(self) -> dict[str, int | str]:
        """Arguments that the kernels share."""
        return {
            "BLOCK_ROWS": self.tile.rows,
            "BLOCK_COLUMNS": self.tile.columns,
            "SPECIAL": SPECIAL,
            "WIDTH": self.width,
            "HEAD": self.head,
            "TAIL": self.tail,
            "RESIDENT": not self.tile.step,
            "PRECISION": self.precision,
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
            # A fused multiply-add of one sweep and a rounded product of the other would make a similarity two numbers.
            "enable_fp_fusion": False,
        }


#: By architecture, kernel and bytes of a number: tiles by the largest width that they serve. "sm_80" keeps within the
#: 99 KiB of shared memory that its smaller relatives (8.6, 8.9, 12.0) have. On "sm_90" all have 8 warps but for
#: "triangle", which has no chained products: others have seen those of 4 warps read out of bounds with Triton 3.7.1.
TILES: dict[tuple[str, str, int], dict[int, Tile]] = (
    {
        ("sm_80", "forward", 2): {
            128: Tile(128, 64, 8, 3),
            192: Tile(128, 64, 8, 2),
            256: Tile(128, 64, 8, 2),
            1024: Tile(128, 64, 8, 3, step=128),
        },
        ("sm_80", "backward", 2): {
            128: Tile(128, 64, 8, 3),
            1024: Tile(64, 64, 8, 2, step=64, out=256),
        },
        ("sm_90", "forward", 2): {
            128: Tile(128, 64, 8, 3),
            256: Tile(128, 64, 8, 2),
            1024: Tile(128, 64, 8, 3, step=128),
        },
        ("sm_90", "backward", 2): {
            128: Tile(128, 128, 8, 2),
            256: Tile(128, 64, 8, 2),
            1024: Tile(64, 64, 8, 2, step=128, out=256),
        },
        ("sm_100", "forward", 2): {
            128: Tile(128, 128, 8, 2),
            256: Tile(128, 64, 8, 2),
            1024: Tile(128, 64, 8, 3, step=128),
        },
        ("sm_100", "backward", 2): {
            128: Tile(128, 64, 8, 3),
            256: Tile(128, 64, 8, 2),
            1024: Tile(64, 64, 8, 2, step=128, out=256),
        },
        ("hip", "forward", 2): {
            128: Tile(64, 64, 4, 2),
            1024: Tile(64, 64, 4, 2, step=64),
        },
        ("hip", "backward", 2): {
            128: Tile(64, 32, 4, 2),
            1024: Tile(64, 64, 4, 2, step=64, out=256),
        },
    }
    | {
        (architecture, kernel, 4): {1024: Tile(64, 32, warps, 2, step=32, out=64 if kernel == "backward" else 0)}
        for architecture, warps in {"sm_80": 4, "sm_90": 8, "sm_100": 8, "hip": 4}.items()
        for kernel in ("forward", "backward")
    }
    | {  # as many rows as "forward" has, and 16 columns a warp on sm_90
        ("sm_80", "triangle", 2): {128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
        ("sm_90", "triangle", 2): {128: Tile(128, 64, 4, 3), 192: Tile(128, 64, 4, 3), 256: Tile(128, 128, 8, 3)},
        ("sm_100", "triangle", 2): {128: Tile(128, 128, 8, 3), 256: Tile(128, 128, 8, 2)},
    }
    | {("interpreter", "triangle", size): {256: Tile(64, 64, 8, 1)} for size in (2, 4)}
    | {
        ("interpreter", kernel, size): {
            256: Tile(64, 64, 8, 1),
            1024: Tile(64, 64, 8, 1, step=256, out=256 if kernel == "backward" else 0),
        }
        for kernel in ("forward", "backward")
        for size in (2, 4)
    }
)

#: What there is to try where rows are loaded whole. Tiles are found through a list, so loads take two steps: only the
#: deepest of these pipelines holds one in flight while a tile is being multiplied.
CANDIDATES = [
    Tile(rows, columns, warps, stages)
    for rows, warps in ((64, 4), (64, 8), (128, 4), (128, 8))
    for columns in (32, 64, 128)
    for stages in (2, 3, 5)
]

#: What there is to try for "triangle" on sm_90.
TRIANGLE_CANDIDATES = [
    Tile(128, columns, warps, stages, polynomial=polynomial, descriptor=descriptor)
    for columns, warps in ((64, 4), (128, 8))
    for stages in (3, 5)
    for polynomial in (0, 8, 4)
    for descriptor in (False, True)
]


def launch_for(rows: Tensor, kernel: str) -> Launch:
    """The table's tile for (N, D) rows, fitted to them; ``kernel`` is "forward" or "backward"."""
    architecture = architecture_of(rows.device)
    by_width = TILES[architecture, kernel, rows.element_size()]
    tile = next(tile for width, tile in by_width.items() if rows.shape[1] <= width)
    return fit(tile, rows.shape[1], rows.dtype, architecture)


def launches_for(rows: Tensor) -> tuple[Launch, Launch]:
    """Those of the forward and of the backward kernel, for rows that both find padded to one width."""
    launches = launch_for(rows, "forward"), launch_for(rows, "backward")
    width = max(launch.width for launch in launches)
    forward, backward = (launch._replace(width=width) for launch in launches)
    return forward, backward


def fit(tile: Tile, width: int, dtype: torch.dtype, architecture: str) -> Launch:
    """Pad a width to what a tile loads.

    Products of float32 numbers are exact to some 21 bits (three products of TF32 numbers, or the ALUs of AMD), unless
    :func:`torch.set_float32_matmul_precision` has allowed less, as for PyTorch's own.
    """
    exact = dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32"
    precision = "ieee" if architecture == "hip" or dtype != torch.float32 else "tf32x3" if exact else "tf32"
    if tile.step:
        unit = max(tile.step, tile.out)
        return Launch(tile, triton.cdiv(width, unit) * unit, tile.step, 0, precision)
    head, tail = _split(width)
    return Launch(tile, head + tail, head, tail, precision)


def _split(width: int) -> tuple[int, int]:
    """A width as one or two powers of two from 16 on, with little padding."""
    whole = max(16, triton.next_power_of_2(width))
    half = whole // 2
    if whole > 16 and width - half <= half // 2:
        return half, max(16, triton.next_power_of_2(width - half))
    return whole, 0


@functools.lru_cache
def architecture_of(device: torch.device) -> str:
    """The table's name for a device."""
    if is_interpreted():
        return "interpreter"
    if torch.version.hip:
        return "hip"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")
