"""The backward sweep in Triton: every tile of similarities is made again, turned into weights and multiplied.

The legend is forward.py's. A program owns the gradient of one block of rows, whole or, where rows are wide, OUT columns
of it, so nothing is added up between programs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixcl_dist.kernels.forward import LOG2E, is_wide, load_rows, load_tile, pair_masks, similarity
from mixcl_dist.kernels.plan import Side, own_tiles, prepare
from mixcl_dist.kernels.relations import Contrast
from mixcl_dist.kernels.tiled import RowScalars
from mixcl_dist.kernels.tuning import launch_for

#: The largest weight of a pair before it is rounded for the product: float16 ends at 65,504, and pairs that weigh a
#: millionth of the largest are still normal numbers.
LARGEST_WEIGHT = 2.0**14

WEIGHTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

UNSORT_ROWS = 2048  #: rows of the result that are cast at a time: a cast of all would take as much memory again


def gradient(
    contrast: Contrast, row_scalars: RowScalars, column_scalars: RowScalars, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As :func:`mixcl_dist.kernels.tiled.gradient`, on a GPU, for float16, bfloat16 and float32."""
    rows, temperature = contrast.rows, contrast.temperature
    launch = launch_for(rows, "backward")
    row_side, column_side, plan = prepare(contrast, launch)
    # A power of two: it changes no bits but those that would be lost.
    share = torch.maximum(row_scalars.share.max(), column_scalars.share.max())
    gain = torch.exp2((LARGEST_WEIGHT / 4 / share.clamp(min=1e-30)).log2().floor())
    wide = is_wide(rows, contrast.columns, temperature)
    count, padded = len(rows), len(row_side.embeddings)
    parts = launch.width // launch.out
    of_rows = of_columns = _pair_scalars(row_side, row_scalars, gain, wide)
    if column_side is not row_side:
        of_columns = _pair_scalars(column_side, column_scalars, gain, wide)
    result = torch.empty(padded, launch.width, dtype=torch.float32, device=rows.device)
    with torch.cuda.device_of(rows):
        for is_wide_variant in (False, True):
            backward_kernel[(len(plan.tiles), parts)](
                row_side.embeddings,
                column_side.embeddings,
                row_side.keys,
                column_side.keys,
                *plan,
                (LOG2E / temperature).float(),
                wide,
                of_rows,
                of_columns,
                result,
                padded,
                len(column_side.embeddings),
                plan.tiles.shape[1],
                len(contrast.relations),
                HAS_GROUP=contrast.row_keys.group is not None,
                WIDE=is_wide_variant,
                OUT=launch.out,
                WEIGHT=WEIGHTS[rows.dtype],
                **launch.options(),
            )
    order, scale = row_side.order, scale / gain
    del row_side, column_side  # as large as the embeddings, and so is what follows
    gradient = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    products = torch.empty(count, dtype=torch.float64, device=rows.device)
    for part, place in zip(result[:count].split(UNSORT_ROWS), order.split(UNSORT_ROWS), strict=True):
        values = part[:, : rows.shape[1]] * scale
        gradient[place] = values.to(dtype)
        products[place] = torch.linalg.vecdot(values, rows[place].float()).double()
    return gradient, products


def _pair_scalars(side: Side, scalars: RowScalars, gain: Tensor, wide: Tensor) -> Tensor:
    """(8, R) float32: factors, then reference exponents for OPEN, SAME and DIFF pairs, then both pulls.

    A row's softmax over the pairs of one kind is factor · 2^(s − exponent): of the identity relation for OPEN pairs, of
    the label relation for SAME, and of both added for DIFF.
    """
    lse, share, pull = (values[:, side.order].double() for values in scalars)
    anchor = share > 0
    exact = torch.where(anchor, lse / math.log(2), torch.inf)
    exponent = torch.where(wide & anchor, exact, torch.where(wide, 1e30, 0.0)).float()
    both = exponent.amin(0, keepdim=True)
    exponent = torch.cat([exponent, both])
    factor = share * torch.exp2(exponent[:2].double() - exact)
    factor = torch.where(anchor, factor, 0)
    shift = torch.exp2(both.double() - exponent[:2])
    factor = torch.cat([factor, (factor * shift).sum(0, keepdim=True)])
    result = torch.zeros(8, len(side.embeddings), dtype=torch.float32, device=lse.device)
    result[:, : len(side.order)] = torch.cat([factor * gain, exponent.double(), pull * gain])
    return result


@triton.jit(do_not_specialize=["column_blocks", "S"])
def backward_kernel(
    rows,  # (R, WIDTH) embeddings
    columns,  # (C, WIDTH)
    row_keys,  # (4, R) int32
    column_keys,  # (4, C)
    tiles,  # (R / BLOCK_ROWS, column_blocks) int32
    counts,  # (R / BLOCK_ROWS, 3) int32: bulk, SAME and mixed tiles
    packed_relations,  # (S, S) int32
    scale,  # 0-d float32, log2(e) / temperature
    wide,  # 0-d bool
    row_scalars,  # (8, R) float32, see _pair_scalars
    column_scalars,  # (8, C)
    result,  # (R, WIDTH) float32
    R,
    C,
    column_blocks,
    S,
    HAS_GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    OUT: tl.constexpr,  # columns of the result that a program finishes, if rows are not RESIDENT
    WEIGHT: tl.constexpr,  # what weights are rounded to before they are multiplied
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SPECIAL: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if (tl.load(wide) != 0) != WIDE:
        return
    row_block, tiles, bulk_end, same_end, mixed_start = own_tiles(tiles, counts, column_blocks)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows += row_block.to(tl.int64) * BLOCK_ROWS * WIDTH
    scale = tl.load(scale)
    head, tail = load_rows(rows, BLOCK_ROWS, WIDTH, HEAD, TAIL, RESIDENT)
    FIRST: tl.constexpr = HEAD if RESIDENT else OUT
    out_start = 0 if RESIDENT else tl.program_id(1) * OUT
    result_head = tl.zeros((BLOCK_ROWS, FIRST), tl.float32)
    result_tail = tl.zeros((BLOCK_ROWS, TAIL if TAIL > 0 else 1), tl.float32)

    for part in tl.static_range(2):  # two loops, of bulk tiles and of SAME tiles
        for number in range(0 if part == 0 else bulk_end, bulk_end if part == 0 else same_end):
            entry = tl.load(tiles + number)
            block = columns + (entry // 4).to(tl.int64) * BLOCK_COLUMNS * WIDTH
            column = (entry // 4) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            s, column_head, column_tail = similarity(
                rows, head, tail, block, BLOCK_ROWS, BLOCK_COLUMNS, WIDTH, HEAD, TAIL, RESIDENT, PRECISION
            )
            kind = entry % 4 - 1  # 0 OPEN, 1 SAME, 2 DIFF
            of_row, of_column = row_scalars + kind * R + row, column_scalars + kind * C + column
            weight = softmax_pair(s * scale, of_row, R, of_column, C, WIDE)
            if part == 1:
                # Positives are subtracted before the weight is rounded: near convergence it is a small difference.
                weight -= pull_pair(row_scalars + 7 * R + row, column_scalars + 7 * C + column)
            result_head, result_tail = multiply(
                weight,
                block + out_start,
                column_head,
                column_tail,
                result_head,
                result_tail,
                BLOCK_COLUMNS,
                WIDTH,
                OUT,
                TAIL,
                RESIDENT,
                WEIGHT,
                PRECISION,
            )

    STEPS: tl.constexpr = BLOCK_COLUMNS // SPECIAL
    for number in range(mixed_start * STEPS, column_blocks * STEPS):
        start = tl.load(tiles + number // STEPS) // 4 * BLOCK_COLUMNS + number % STEPS * SPECIAL
        block = columns + start.to(tl.int64) * WIDTH
        column = start + tl.arange(0, SPECIAL)
        s, column_head, column_tail = similarity(
            rows, head, tail, block, BLOCK_ROWS, SPECIAL, WIDTH, HEAD, TAIL, RESIDENT, PRECISION
        )
        s *= scale
        in_identity, in_label, twin, same = pair_masks(
            row_keys, column_keys, packed_relations, row, start, R, C, S, HAS_GROUP, SPECIAL
        )
        weight = softmax_pair(s, row_scalars + row, R, column_scalars + column, C, WIDE)
        weight = tl.where(in_identity, weight, 0.0)
        of_label = softmax_pair(s, row_scalars + R + row, R, column_scalars + C + column, C, WIDE)
        weight += tl.where(in_label, of_label, 0.0)
        weight -= tl.where(twin, pull_pair(row_scalars + 6 * R + row, column_scalars + 6 * C + column), 0.0)
        weight -= tl.where(same, pull_pair(row_scalars + 7 * R + row, column_scalars + 7 * C + column), 0.0)
        result_head, result_tail = multiply(
            weight,
            block + out_start,
            column_head,
            column_tail,
            result_head,
            result_tail,
            SPECIAL,
            WIDTH,
            OUT,
            TAIL,
            RESIDENT,
            WEIGHT,
            PRECISION,
        )

    result += row_block.to(tl.int64) * BLOCK_ROWS * WIDTH + out_start
    store_tile(result, result_head, BLOCK_ROWS, WIDTH, FIRST)
    if TAIL > 0:
        store_tile(result + HEAD, result_tail, BLOCK_ROWS, WIDTH, TAIL)


@triton.jit
def softmax_pair(s, of_row, R, of_column, C, WIDE: tl.constexpr):
    """(rows, columns) the softmax of row i at j and of row j at i, weighted and added: one exponential unless WIDE."""
    row_factor = tl.load(of_row)[:, None]
    column_factor = tl.load(of_column)[None, :]
    if WIDE:
        row_exponent = tl.load(of_row + 3 * R)[:, None]
        column_exponent = tl.load(of_column + 3 * C)[None, :]
        return row_factor * tl.exp2(s - row_exponent) + column_factor * tl.exp2(s - column_exponent)
    return tl.exp2(s) * (row_factor + column_factor)


@triton.jit
def pull_pair(of_row, of_column):
    return tl.load(of_row)[:, None] + tl.load(of_column)[None, :]


@triton.jit
def multiply(
    weight,
    columns,
    column_head,
    column_tail,
    result_head,
    result_tail,
    BLOCK_COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    TAIL: tl.constexpr,
    RESIDENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add weight · columns to the result's parts."""
    if not RESIDENT:
        column_head = load_tile(columns, BLOCK_COLUMNS, WIDTH, OUT)
    if tl.bfloat16 == WEIGHT and column_head.dtype == tl.float32:  # interpreted: that truncates where GPUs round
        bits = weight.to(tl.int32, bitcast=True)
        weight = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    else:
        weight = weight.to(WEIGHT)
    result_head = tl.dot(weight, column_head, result_head, input_precision=PRECISION)
    if TAIL > 0:
        result_tail = tl.dot(weight, column_tail, result_tail, input_precision=PRECISION)
    return result_head, result_tail


@triton.jit
def store_tile(base, values, COUNT: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr):
    tl.store(base + tl.arange(0, COUNT)[:, None] * WIDTH + tl.arange(0, PART)[None, :], values)
