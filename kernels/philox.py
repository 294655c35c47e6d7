"""The kernel of :func:`mixcl_dist.kernels.random.random`: a batch of random numbers in one launch."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS_PER_BLOCK = 8  #: four words of 64 bits
BLOCKS = 128  #: of a program
TWO_PI = tl.constexpr(2 * math.pi)


def fill(slot: Tensor, seed: int, draw: int, parts: int, count: int, normal: bool, dtype: torch.dtype) -> Tensor:
    """As :func:`mixcl_dist.kernels.random.random`, on a GPU."""
    out = torch.empty(parts * len(slot), count, dtype=dtype, device=slot.device)
    grid = len(out), triton.cdiv(count, BLOCKS * NUMBERS_PER_BLOCK)
    if out.numel():
        with torch.cuda.device_of(slot):
            philox_kernel[grid](slot, out, seed, draw, len(slot), count, NORMAL=normal, BLOCKS=BLOCKS)
    return out


@triton.jit(do_not_specialize=["seed", "draw", "slots", "count"])
def philox_kernel(slot, out, seed, draw, slots, count, NORMAL: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCKS
    block = (first + tl.arange(0, BLOCKS) + 1).to(tl.int64)
    own_slot, part = tl.load(slot + row % slots), (row // slots).to(tl.int64)
    a, b, c, d = tl.philox(seed, block, draw.to(tl.int64), own_slot, part)
    word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))  # a, b, c, d of a block, then of the next
    even, odd = _uniform(word), _uniform(word >> 32)
    if NORMAL:  # Box and Muller's; the logarithm of almost 1 may be rounded to more than 0
        radius = tl.sqrt(tl.maximum(-2 * tl.log(even), 0))
        even, odd = radius * tl.cos(odd * TWO_PI), radius * tl.sin(odd * TWO_PI)
    place = first * 8 + tl.arange(0, 8 * BLOCKS)
    tl.store(out + row.to(tl.int64) * count + place, tl.interleave(even, odd), mask=place < count)


@triton.jit
def _uniform(word):
    """The upper 24 of a word's lower 32 bits, the last of them set."""
    return (((word & 0xFFFFFFFF) >> 8) | 1).to(tl.float32) * (1.0 / (1 << 24))
