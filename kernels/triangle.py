"""The forward sweep over half of the pairs: one tile's exponentials serve the sums of its rows and of its columns.

A batch against itself has a symmetric matrix of similarities. Where they are narrow (|s| below UNSHIFTED_LIMIT, so that
no row needs a reference exponent of its own), exp(s_ij) is one number for row i and for row j: of every two mirrored
tiles one is made, which is N²D operations of the forward's 2N²D, and half of the exponentials.

**Which pairs.** The unit is the plan's block of rows. A pair of blocks (I, J) is *whole* where neither has padding and
all tiles that the plan lists in I × J are bulk tiles of one relation. Sorted rows hold consecutive sets, so what is
known of a block's sets, identities and groups is the same whether it stands for rows or for columns: (J, I) is whole,
too, and of the same relation. A block with itself never is. I makes (I, J) where J is at most half of the way ahead on
the circle of n blocks, (J − I) mod n ≤ n / 2: as many pairs as above the diagonal, and no block has more than others.
What is not in a whole pair is the *rest* of the plan, and goes through ``forward_kernel`` on both sides of the
diagonal: SAME and mixed tiles, with all positives and masks, and bulk tiles along borders of sets. Where similarities
are wide that kernel takes the whole plan.

**Who adds what.** Program (strip, part) takes the blocks I ≡ strip (mod STRIPS) in turn, and for each the whole pairs
(I, J) with J ≡ part (mod PARTS), DIFF pairs and then OPEN ones. I stays in shared memory. Its sums stay in registers,
one for each element of a tile, until its last J. J's sums are reduced in each tile and added to the strip's own partial
sums in memory: programs of one strip differ in J, so nobody else writes there. There are no atomics, and the order
depends on the plan alone: STRIPS and PARTS are constants rather than numbers of multiprocessors, so bits do not depend
on the card. The partial sums take 8 · (STRIPS + PARTS) bytes a row.

**Layout.** J is the product's first operand and I its second, as a thread holds much of few rows: what is reduced in
every tile is then nearly all in one thread, and what would take a reduction through shared memory waits in registers.
That wants 16 of J's rows a warp on Hopper. Blocks are found through a list, so loads take two steps: a pipeline of 3 or
4 stages waits for a load as soon as it has asked for it, one of 5 stages a tile later. Triton 3.7.1 refuses to
specialise warps in this loop for 4 of them on compute capability 9.0 ("PassManager::run failed"), and does not for 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mixcl_dist.kernels.forward import LOG2E, is_wide, load_rows, load_tile
from mixcl_dist.kernels.plan import CHUNK, Plan, Side, own_tiles
from mixcl_dist.kernels.tuning import Launch, Tile

#: 384 programs: about three for each of 132 multiprocessors, and 352 bytes of partial sums a row.
STRIPS, PARTS = 32, 12


class Triangle(NamedTuple):
    """A plan of a batch against itself, divided into whole pairs of blocks, each once, and the rest."""

    pairs: Tensor  #: (blocks, PARTS, capacity) int32: the J of each I and part, DIFF from the front, OPEN from the back
    pair_counts: Tensor  #: (blocks, PARTS, 2) int32: DIFF, OPEN
    rest: Plan


def divide(plan: Plan, side: Side, tile: Tile) -> Triangle:
    """Divide the plan of a side against itself, made for a "forward" tile; it is left as it is.

    Nothing here waits for the device.
    """
    tiles, counts = plan
    blocks, column_blocks = tiles.shape
    rest = Plan(torch.empty_like(tiles), torch.empty_like(counts))
    kinds = torch.zeros(blocks, blocks, dtype=torch.uint8, device=tiles.device)
    capacity = blocks // (2 * PARTS) + 2  # half of the circle, which may begin and end amid a round of parts
    pairs = tiles.new_empty(blocks, PARTS, capacity)
    pair_counts = counts.new_empty(blocks, PARTS, 2)
    _divide_kernel[(blocks,)](
        tiles,
        counts,
        side.keys,
        kinds,
        rest.tiles,
        rest.counts,
        blocks,
        column_blocks,
        BLOCK=tile.rows,
        RATIO=tile.rows // tile.columns,
        CHUNK=CHUNK,
    )
    _pair_kernel[(blocks, PARTS)](kinds, pairs, pair_counts, blocks, capacity, PARTS=PARTS, CHUNK=CHUNK)
    return Triangle(pairs, pair_counts, rest)


def add_pair_sums(out: Tensor, side: Side, triangle: Triangle, temperature: Tensor, launch: Launch) -> None:
    """Add the whole pairs' sums to the bulk sums that ``forward_kernel`` leaves of the rest; nothing if they are wide.

    Args:
        out: (10, R) float32, as of ``forward_kernel``.
        launch: for these rows and "triangle"; its tile has the rows of the one that the plan was made for.
    """
    tile, padded = launch.tile, out.shape[1]
    own_sums = out.new_empty(PARTS, 2, padded)
    strip_sums = out.new_zeros(STRIPS, 2, padded)
    streamed = TensorDescriptor.from_tensor(side.embeddings, [tile.columns, launch.head]) if tile.descriptor else None
    triangle_kernel[(STRIPS, PARTS)](
        side.embeddings,
        streamed,
        triangle.pairs,
        triangle.pair_counts,
        temperature,
        side.norm,
        own_sums,
        strip_sums,
        padded,
        *triangle.pairs.shape[::2],
        STRIPS=STRIPS,
        PARTS=PARTS,
        POLYNOMIAL=tile.polynomial,
        **launch.options(),
    )
    _add_kernel[(padded // tile.rows,)](
        own_sums, strip_sums, temperature, side.norm, out, padded, STRIPS=STRIPS, PARTS=PARTS, BLOCK=tile.rows
    )


@triton.jit(do_not_specialize=["blocks", "column_blocks"])
def _divide_kernel(
    tiles,  # (blocks, column_blocks) int32, of a Plan
    counts,  # (blocks, 3) int32
    keys,  # (4, R) int32
    kinds,  # (blocks, blocks) uint8, of zeros: here the relations of whole pairs
    rest_tiles,  # (blocks, column_blocks) int32
    rest_counts,  # (blocks, 3) int32
    blocks,
    column_blocks,
    BLOCK: tl.constexpr,
    RATIO: tl.constexpr,  # blocks of columns in a block of rows
    CHUNK: tl.constexpr,
):
    """Bulk tiles are listed in the order of their columns, so those of a whole pair are RATIO neighbours."""
    row_block, tiles, bulk_end, same_end, mixed_start = own_tiles(tiles, counts, column_blocks)
    has_padding = tl.load(keys + row_block * BLOCK + BLOCK - 1) < 0
    kinds += row_block.to(tl.int64) * blocks
    rest_tiles += row_block.to(tl.int64) * column_blocks
    rest = tl.zeros((), tl.int32)
    for first in range(0, bulk_end, CHUNK):
        number = first + tl.arange(0, CHUNK)
        real = number < bulk_end
        entry = tl.load(tiles + number, mask=real, other=0)
        before = entry // 4 % RATIO  # tiles of the pair before this one
        is_whole = real & (has_padding == 0)
        for tile in tl.static_range(RATIO):
            place = number - before + tile
            other = tl.load(tiles + place, mask=real & (place >= 0) & (place < bulk_end), other=-1)
            is_whole &= other == entry + 4 * (tile - before)
        tl.store(kinds + entry // 4 // RATIO, (entry % 4).to(tl.uint8), mask=is_whole & (before == 0))
        is_rest = real & ~is_whole
        tl.store(rest_tiles + rest + tl.cumsum(is_rest.to(tl.int32), 0) - 1, entry, mask=is_rest)
        rest += tl.sum(is_rest.to(tl.int32), 0)
    for first in range(0, column_blocks - bulk_end, CHUNK):  # SAME tiles follow the bulk, mixed ones keep their places
        number = bulk_end + first + tl.arange(0, CHUNK)
        is_same = number < same_end
        listed = is_same | ((number >= mixed_start) & (number < column_blocks))
        place = tl.where(is_same, number - bulk_end + rest, number)
        tl.store(rest_tiles + place, tl.load(tiles + number, mask=listed, other=0), mask=listed)
    tl.store(rest_counts + row_block * 3, rest)
    tl.store(rest_counts + row_block * 3 + 1, same_end - bulk_end)
    tl.store(rest_counts + row_block * 3 + 2, column_blocks - mixed_start)


@triton.jit(do_not_specialize=["blocks", "capacity"])
def _pair_kernel(
    kinds,  # (blocks, blocks) uint8
    pairs,  # (blocks, PARTS, capacity) int32
    pair_counts,  # (blocks, PARTS, 2) int32
    blocks,
    capacity,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    own, part = tl.program_id(0), tl.program_id(1)
    kinds += own.to(tl.int64) * blocks
    pairs += (own * PARTS + part).to(tl.int64) * capacity
    differing = tl.zeros((), tl.int32)
    open_pairs = tl.zeros((), tl.int32)
    for first in range(part, blocks, PARTS * CHUNK):
        other = first + PARTS * tl.arange(0, CHUNK)
        twice_ahead = (other - own + blocks) % blocks * 2
        # Of two blocks that face each other on the circle the first one makes the pair.
        is_own = (twice_ahead < blocks) | ((twice_ahead == blocks) & (own < other))
        kind = tl.load(kinds + other, mask=is_own & (other < blocks), other=0)
        is_diff = (kind == 3).to(tl.int32)
        tl.store(pairs + differing + tl.cumsum(is_diff, 0) - 1, other, mask=kind == 3)
        differing += tl.sum(is_diff, 0)
        is_open = (kind == 1).to(tl.int32)
        tl.store(pairs + capacity - open_pairs - tl.cumsum(is_open, 0), other, mask=kind == 1)
        open_pairs += tl.sum(is_open, 0)
    tl.store(pair_counts + (own * PARTS + part) * 2, differing)
    tl.store(pair_counts + (own * PARTS + part) * 2 + 1, open_pairs)


@triton.jit(do_not_specialize=["blocks", "capacity"])
def triangle_kernel(
    embeddings,  # (R, WIDTH)
    streamed,  # the same as a tensor descriptor, or None
    pairs,  # (blocks, PARTS, capacity) int32
    pair_counts,  # (blocks, PARTS, 2) int32
    temperature,  # 0-d float32
    norm,  # 0-d float32, the largest length of a row
    own_sums,  # (PARTS, 2, R) float32, sums of I over DIFF pairs and over OPEN pairs
    strip_sums,  # (STRIPS, 2, R) float32, of J; zeros before
    R,
    blocks,
    capacity,
    STRIPS: tl.constexpr,
    PARTS: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # of I
    BLOCK_COLUMNS: tl.constexpr,  # of J, at a time
    SPECIAL: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if is_wide(norm, norm, temperature):
        return
    strip, part = tl.program_id(0), tl.program_id(1)
    scale = 1 / tl.load(temperature) * LOG2E
    own_sums += part * 2 * R
    strip_sums += strip * 2 * R
    STEPS: tl.constexpr = BLOCK_ROWS // BLOCK_COLUMNS
    for own in range(strip, blocks, STRIPS):
        head, tail = load_rows(embeddings + own * (BLOCK_ROWS * WIDTH), BLOCK_ROWS, WIDTH, HEAD, TAIL, RESIDENT)
        number_list = pairs + (own * PARTS + part) * capacity
        for relation in tl.static_range(2):
            count = tl.load(pair_counts + (own * PARTS + part) * 2 + relation)
            start = 0 if relation == 0 else capacity - count
            total = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), tl.float32)
            for number in range(start * STEPS, (start + count) * STEPS):
                first = tl.load(number_list + number // STEPS) * BLOCK_ROWS + number % STEPS * BLOCK_COLUMNS
                if streamed is None:
                    part_of_j = load_tile(embeddings + first.to(tl.int64) * WIDTH, BLOCK_COLUMNS, WIDTH, HEAD)
                else:
                    part_of_j = streamed.load([first, 0])
                s = tl.dot(part_of_j, tl.trans(head), input_precision=PRECISION)
                if TAIL > 0:
                    part_of_j = load_tile(embeddings + first.to(tl.int64) * WIDTH + HEAD, BLOCK_COLUMNS, WIDTH, TAIL)
                    s = tl.dot(part_of_j, tl.trans(tail), s, input_precision=PRECISION)
                e = exp2_shared(s * scale, POLYNOMIAL)
                total += e
                place = strip_sums + relation * R + first + tl.arange(0, BLOCK_COLUMNS)
                tl.store(place, tl.load(place) + tl.sum(e, 1))
            tl.store(own_sums + relation * R + own * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.sum(total, 0))
        tl.debug_barrier()  # the next I may read a sum of J in another thread than the one that wrote it


@triton.jit
def _add_kernel(
    own_sums,  # (PARTS, 2, R) float32
    strip_sums,  # (STRIPS, 2, R) float32
    temperature,  # 0-d float32
    norm,  # 0-d float32
    out,  # (10, R) float32, bulk sums of the identity and of the label relation first
    R,
    STRIPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if is_wide(norm, norm, temperature):
        return
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    differing = tl.zeros((BLOCK,), tl.float32)
    open_pairs = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        differing += tl.load(own_sums + 2 * part * R + row)
        open_pairs += tl.load(own_sums + (2 * part + 1) * R + row)
    for strip in range(STRIPS):
        differing += tl.load(strip_sums + 2 * strip * R + row)
        open_pairs += tl.load(strip_sums + (2 * strip + 1) * R + row)
    tl.store(out + row, tl.load(out + row) + differing + open_pairs)
    tl.store(out + R + row, tl.load(out + R + row) + differing)


@triton.jit
def exp2_shared(x, POLYNOMIAL: tl.constexpr):
    """2^x of (rows, columns); one in POLYNOMIAL (0: none, or 1, 2, 4, 8) on the units for multiply-adds.

    Columns go by eights, of which a thread holds some of each: a tile is then taken apart and put together in place.
    """
    if POLYNOMIAL == 0:
        result = tl.exp2(x)
    else:
        eights = tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8))
        result = tl.reshape(_exp2_of_eights(eights, POLYNOMIAL), x.shape)
    return result


@triton.jit
def _exp2_of_eights(x, POLYNOMIAL: tl.constexpr):
    if POLYNOMIAL == 1:
        result = exp2_polynomial(x)
    else:
        even, odd = tl.split(tl.permute(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2, 8)), (0, 1, 3, 2)))
        both = tl.join(tl.exp2(even), _exp2_of_eights(odd, POLYNOMIAL // 2))
        result = tl.reshape(tl.permute(both, (0, 1, 3, 2)), x.shape)
    return result


@triton.jit
def exp2_polynomial(x):
    """2^x for |x| < 126, off by less than 1.7·10⁻⁷ of it: x = n + f, |f| ≤ 1/2, and a polynomial in f.

    n is rounded into the last bits of a number of 1.5·2²³'s size, whence it is added to the exponent's bits. The
    coefficients make the largest relative error least, with 2^0 = 1. A fused multiply-add is asked for by name: the
    kernels' options keep the compiler from making them.
    """
    shifted = x + 12582912.0
    f = x - (shifted - 12582912.0)
    p = tl.fma(f, 0.001326472731307149, 0.009671512991189957)
    p = tl.fma(f, p, 0.05550733581185341)
    p = tl.fma(f, p, 0.24022242426872253)
    p = tl.fma(f, p, 0.6931470036506653)
    p = tl.fma(f, p, 1.0)
    return (p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)
