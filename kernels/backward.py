"""The backward sweep in Triton: every tile of similarities is made again, turned into weights and multiplied.

The legend is forward.py's. A program owns the gradient of one block of rows, whole or, where rows are wide, OUT columns
of it, so nothing is added up between programs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixcl_dist.kernels.forward import (
    LN2,
    LOG2E,
    is_wide,
    lengths,
    load_rows,
    load_tile,
    of_pairs,
    pair_masks,
    similarity,
)
from mixcl_dist.kernels.index import Index, share_of
from mixcl_dist.kernels.plan import Plan, Side, own_tiles
from mixcl_dist.kernels.tuning import Launch

#: log₂ of the largest weight of a pair before it is rounded for the product, to which both rows and both relations add:
#: float16 ends at 65,504, and pairs that weigh a millionth of the largest are still normal numbers.
LARGEST_EXPONENT = tl.constexpr(12)

WEIGHTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def pair_scalars(
    side: Side,
    norms: tuple[Tensor, Tensor],
    index: Index,
    lse: Tensor,
    temperature: Tensor,
    weights: tuple[float, float],
) -> Tensor:
    """(8, R) float32: factors, then reference exponents for OPEN, SAME and DIFF pairs, then both pulls, all but the
    exponents times a power of two that brings the largest near 2^LARGEST_EXPONENT.

    A row's softmax over the pairs of one kind is factor · 2^(s − exponent): of the identity relation for OPEN pairs, of
    the label relation for SAME, and of both added for DIFF.

    Args:
        norms: the largest lengths of rows and of columns.
        lse: (2, N) float64 of all rows of the batch.
        weights: of the identity and of the label relation.
    """
    padded = side.keys.shape[1]
    scalars = torch.empty(8, padded, dtype=torch.float32, device=lse.device)
    _scalars_kernel[(triton.cdiv(padded, 256),)](
        side.keys,
        index.positives,
        index.weight,
        index.totals,
        lse,
        *norms,
        temperature,
        scalars,
        padded,
        lse.shape[1],
        *weights,
    )
    return scalars


class Gradient(NamedTuple):
    """Where a sweep writes, and by what it multiplies."""

    embeddings: Tensor  #: (n, D), in the rows' own order
    products: Tensor  #: (parts, R) float32, of which the sum is the gradient of the temperature
    upstream: Tensor  #: 0-d
    processes: int  #: frameworks average parameters' gradients over processes, of which each has a part of the sum
    first_row: int  #: of the n rows in the batch
    rounded: torch.dtype  #: what pairs' weights are rounded to before they are multiplied

    def add_(self, other: Gradient) -> Gradient:
        self.embeddings.add_(other.embeddings)
        self.products.add_(other.products)
        return self


def sweep(
    rows: Side,
    columns: Side,
    plan: Plan,
    index: Index,
    scalars: tuple[Tensor, Tensor],
    gradient: Gradient,
    temperature: Tensor,
    launch: Launch,
) -> None:
    """Write the gradient, Σ_j (g_ij + g_ji) z_j / τ over these columns."""
    for is_wide_variant in (False, True):
        backward_kernel[(len(plan.tiles), len(gradient.products))](
            *of_pairs(rows, columns, plan, index, temperature),
            *scalars,
            index.totals,
            gradient.upstream,
            gradient.embeddings,
            gradient.products,
            *lengths(rows, columns, plan, index),
            gradient.first_row,
            gradient.processes,
            HAS_GROUP=index.has_group,
            WIDE=is_wide_variant,
            OUT=launch.out,
            D=gradient.embeddings.shape[1],
            WEIGHT=WEIGHTS[gradient.rounded],
            **launch.options(),
        )


@triton.jit
def gain_of(totals):
    """A power of two: it changes no bits but those that would be lost. Made of bits, it is the same in every kernel."""
    largest = tl.maximum(tl.load(totals + 6).to(tl.float32), 1e-30)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    return ((126 - exponent + LARGEST_EXPONENT) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["R", "N"])
def _scalars_kernel(
    keys,  # (4, R) int32
    positives,  # (2, N) int32
    weights,  # (2, N) float64
    totals,  # float64
    lse,  # (2, N) float64
    row_norm,
    column_norm,
    temperature,
    scalars,  # (8, R) float32
    R,
    N,
    identity_weight,
    label_weight,
    BLOCK: tl.constexpr = 256,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = row < R
    is_present = tl.load(keys + row, mask=real, other=-1) >= 0
    position = tl.load(keys + 3 * R + row, mask=real, other=-1)
    wide = is_wide(row_norm, column_norm, temperature)
    gain = gain_of(totals).to(tl.float64)
    exponent, factor, pull = row_scalars_of(
        0, positives, weights, totals, lse, N, position, is_present, wide, identity_weight
    )
    label_exponent, label_factor, label_pull = row_scalars_of(
        1, positives, weights, totals, lse, N, position, is_present, wide, label_weight
    )
    both = tl.minimum(exponent, label_exponent)
    reference = both.to(tl.float64)
    factor_of_both = factor * tl.exp2(reference - exponent) + label_factor * tl.exp2(reference - label_exponent)
    scalars += row
    tl.store(scalars, (factor * gain).to(tl.float32), mask=real)
    tl.store(scalars + R, (label_factor * gain).to(tl.float32), mask=real)
    tl.store(scalars + 2 * R, (factor_of_both * gain).to(tl.float32), mask=real)
    tl.store(scalars + 3 * R, exponent, mask=real)
    tl.store(scalars + 4 * R, label_exponent, mask=real)
    tl.store(scalars + 5 * R, both, mask=real)
    tl.store(scalars + 6 * R, (pull * gain).to(tl.float32), mask=real)
    tl.store(scalars + 7 * R, (label_pull * gain).to(tl.float32), mask=real)


@triton.jit
def row_scalars_of(
    relation: tl.constexpr,
    positives,
    weights,
    totals,
    lse,
    N,
    position,
    is_present,
    wide,
    relation_weight,
):
    """The reference exponent (float32) of a row's softmax, its factor and the pull of a positive (float64)."""
    at = relation * N + position
    share = share_of(tl.load(weights + at, mask=is_present, other=0), tl.load(totals + relation)) * relation_weight
    anchor = share > 0
    exact = tl.where(anchor, tl.load(lse + at, mask=is_present, other=0) / LN2, float("inf"))
    exponent = tl.where(wide, tl.where(anchor, exact, 1e30), 0.0).to(tl.float32)
    factor = tl.where(anchor, share * tl.exp2(exponent.to(tl.float64) - exact), 0.0)
    pull = share / tl.maximum(tl.load(positives + at, mask=is_present, other=1), 1)
    return exponent, factor, pull


@triton.jit(do_not_specialize=["column_blocks", "words", "first_row", "processes"])
def backward_kernel(
    rows,  # (R, WIDTH) embeddings
    columns,  # (C, WIDTH)
    row_keys,  # (4, R) int32
    column_keys,  # (4, C)
    tiles,  # (R / BLOCK_ROWS, column_blocks) int32
    counts,  # (R / BLOCK_ROWS, 3) int32: bulk, SAME and mixed tiles
    packed_relations,  # (S, words) int32
    temperature,  # 0-d float32
    row_norm,  # 0-d float32
    column_norm,
    row_scalars,  # (8, R) float32, see pair_scalars
    column_scalars,  # (8, C)
    totals,  # float64
    upstream,  # 0-d
    gradient,  # (n, D)
    products,  # (parts, R) float32
    R,
    C,
    column_blocks,
    words,
    first_row,
    processes,
    HAS_GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
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
    if is_wide(row_norm, column_norm, temperature) != WIDE:
        return
    row_block, tiles, bulk_end, same_end, mixed_start = own_tiles(tiles, counts, column_blocks)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows += row_block.to(tl.int64) * BLOCK_ROWS * WIDTH
    scale = 1 / tl.load(temperature) * LOG2E
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
            row_keys, column_keys, packed_relations, row, start, R, C, words, HAS_GROUP, SPECIAL
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

    scale = tl.load(upstream).to(tl.float32) * processes / tl.load(temperature) / gain_of(totals)
    is_present = tl.load(row_keys + row) >= 0
    position = tl.load(row_keys + 3 * R + row)
    target = gradient + (position - first_row).to(tl.int64) * D
    rows += out_start
    product = store_gradient(target, out_start, rows, result_head, is_present, position, scale, D, WIDTH, FIRST)
    if TAIL > 0:
        product += store_gradient(target, HEAD, rows + HEAD, result_tail, is_present, position, scale, D, WIDTH, TAIL)
    # Every similarity is z_i·z_j / τ, so scaling all rows and scaling 1/√τ are the same move.
    tl.store(products + tl.program_id(1) * R + row, -0.5 * product / tl.load(temperature))


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
def store_gradient(
    target, first, rows, values, is_present, position, scale, D: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr
):
    """Store PART features of the gradient, from `first` on, and give their inner products with the rows."""
    feature = tl.arange(0, PART)
    values = tl.where(is_present[:, None], values * scale, 0.0)
    inside = (position >= 0)[:, None] & (first + feature < D)[None, :]
    tl.store(target[:, None] + first + feature[None, :], values, mask=inside)
    row = load_tile(rows, values.shape[0], WIDTH, PART).to(tl.float32)
    return tl.sum(values * row, 1)
