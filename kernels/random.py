"""Counter-based random numbers: what a patch is given is a function of its place, on any device and in any batch.

Philox-4x64-10 (Salmon et al. 2011), by numpy on a CPU and in one Triton kernel on a GPU, of the same bits. The key is
(seed, 0); the counter of a block of four words is (number of the block from 1, draw, slot, part).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mixcl_dist.kernels.implementation import obstacle


@torch.library.custom_op("mixcl_dist::random", mutates_args=())
def random(slot: Tensor, seed: int, draw: int, parts: int, count: int, normal: bool, dtype: torch.dtype) -> Tensor:
    """Independent numbers, each determined by (seed, slot, draw, part) and its place in the row alone.

    Args:
        slot: (B,) int64, ≥ 0.
        seed: ≥ 0.
        draw: which draw of the same slots it is, ≥ 0.
        parts: P, how many rows of numbers each slot is given.
        count: n, how many numbers a row has.
        normal: standard normal numbers, equal on all devices but for rounding; else uniform ones in (0, 1), odd
            multiples of 2⁻²⁴, equal to the bit.
        dtype: float32, or float64 of the same numbers.

    Returns:
        (P · B, n), the first row of each slot, then the second of each, and so on.
    """
    if slot.device.type == "cpu" or obstacle(slot.device, torch.float32, 1):
        return _by_numpy(slot.tolist(), seed, draw, parts, count, normal).to(slot.device, dtype)
    from mixcl_dist.kernels.philox import fill

    return fill(slot, seed, draw, parts, count, normal, dtype)


@random.register_fake
def _(slot, seed, draw, parts, count, normal, dtype):
    return slot.new_empty(parts * slot.shape[0], count, dtype=dtype)


def _by_numpy(slots: list[int], seed: int, draw: int, parts: int, count: int, normal: bool) -> Tensor:
    rows = [(part, slot) for part in range(parts) for slot in slots]
    words = np.empty((len(rows), -(-count // 2)), dtype=np.uint64)
    for row, (part, slot) in zip(words, rows, strict=True):
        row[:] = np.random.Philox(key=[seed, 0], counter=[0, draw, slot, part]).random_raw(len(row))
    numbers = torch.from_numpy(((words.view(np.uint32) >> 8) | 1).astype(np.float32)).mul_(2**-24)
    if normal:
        numbers = _box_muller(numbers.view(len(rows), -1, 2)).view(len(rows), -1)
    return numbers[:, :count].contiguous()


def _box_muller(uniform: Tensor) -> Tensor:
    """(…, 2) uniform numbers → (…, 2) normal ones."""
    radius = uniform[..., :1].log().mul_(-2).sqrt_()
    angle = uniform[..., 1:] * (2 * math.pi)
    return radius * torch.cat([angle.cos(), angle.sin()], dim=-1)
