"""The forward sweep in Triton: each row's log-sum-exps and its sum of similarities with positives.

Legend: R rows and C columns, both sorted and padded to whole blocks; S candidate sets; width = D padded. A program owns
one block of rows and walks through the tiles that its plan lists. All sums are float32, and those over special tiles,
which hold all positives, are kept apart from those over bulk tiles: a sum that one positive dominates would lose what
thousands of bulk tiles add to it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixcl_dist.kernels.plan import own_tiles, prepare
from mixcl_dist.kernels.relations import Contrast
from mixcl_dist.kernels.tiled import UNSHIFTED_LIMIT
from mixcl_dist.kernels.tuning import launch_for

LOG2E = math.log2(math.e)


def log_sums(contrast: Contrast) -> tuple[Tensor, Tensor]:
    """As :func:`mixcl_dist.kernels.tiled.log_sums`, on a GPU, for float16, bfloat16 and float32."""
    rows, temperature = contrast.rows, contrast.temperature
    launch = launch_for(rows, "forward")
    row_side, column_side, plan = prepare(contrast, launch)
    count, padded = len(rows), len(row_side.embeddings)
    # Bulk and special sums of both relations, their reference exponents, sums over positives.
    out = torch.zeros(10, padded, dtype=torch.float32, device=rows.device)
    wide = is_wide(rows, contrast.columns, temperature)
    with torch.cuda.device_of(rows):
        for is_wide_variant in (False, True):
            forward_kernel[(len(plan.tiles),)](
                row_side.embeddings,
                column_side.embeddings,
                row_side.keys,
                column_side.keys,
                *plan,
                (LOG2E / temperature).float(),
                wide,
                out,
                padded,
                len(column_side.embeddings),
                plan.tiles.shape[1],
                len(contrast.relations),
                HAS_GROUP=contrast.row_keys.group is not None,
                WIDE=is_wide_variant,
                **launch.options(),
            )
    sums, exponent, positive = out[:, :count].double().split([4, 4, 2])
    parts = math.log(2) * (sums.log2() + exponent)
    parts = torch.where(sums > 0, parts, torch.where(sums == 0, -torch.inf, torch.nan))
    lse, result = torch.empty_like(positive), torch.empty_like(positive)
    lse[:, row_side.order] = torch.logaddexp(parts[:2], parts[2:])
    result[:, row_side.order] = positive
    for relation in range(2):
        if not contrast.active >> relation & 1:  # mixed tiles make both
            lse[relation], result[relation] = -torch.inf, 0
    return lse, result


def is_wide(rows: Tensor, columns: Tensor, temperature: Tensor) -> Tensor:
    """0-d bool, on the device: whether exp(s) could leave float32's range without a reference exponent."""
    row, column = (torch.linalg.vector_norm(side, dim=1, dtype=torch.float32).max() for side in (rows, columns))
    return row * column / temperature >= UNSHIFTED_LIMIT


@triton.jit(do_not_specialize=["column_blocks", "S"])
def forward_kernel(
    rows,  # (R, WIDTH) embeddings
    columns,  # (C, WIDTH)
    row_keys,  # (4, R) int32
    column_keys,  # (4, C)
    tiles,  # (R / BLOCK_ROWS, column_blocks) int32
    counts,  # (R / BLOCK_ROWS, 3) int32: bulk, SAME and mixed tiles
    packed_relations,  # (S, S) int32
    scale,  # 0-d float32, log2(e) / temperature
    wide,  # 0-d bool
    out,  # (10, R) float32
    R,
    C,
    column_blocks,
    S,
    HAS_GROUP: tl.constexpr,
    WIDE: tl.constexpr,  # the variant for `wide` similarities; the other one returns at once
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SPECIAL: tl.constexpr,  # columns of a mixed tile at a time: masks take registers
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,  # a row is loaded whole as HEAD + TAIL, or in steps of HEAD if RESIDENT is false
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

    identity = tl.zeros((BLOCK_ROWS,), tl.float32)
    label = tl.zeros((BLOCK_ROWS,), tl.float32)
    identity_exponent = tl.full((BLOCK_ROWS,), float("-inf") if WIDE else 0.0, tl.float32)
    label_exponent = identity_exponent
    for number in range(0, bulk_end):
        entry = tl.load(tiles + number)
        block = columns + (entry // 4).to(tl.int64) * BLOCK_COLUMNS * WIDTH
        s, _, _ = similarity(rows, head, tail, block, BLOCK_ROWS, BLOCK_COLUMNS, WIDTH, HEAD, TAIL, RESIDENT, PRECISION)
        total, exponent = exp_sum(s * scale, WIDE)
        identity, identity_exponent = add_sum(identity, identity_exponent, total, exponent, WIDE)
        total = tl.where(entry % 4 == 3, total, 0.0)  # DIFF; an OPEN pair does not exist for the label relation
        label, label_exponent = add_sum(label, label_exponent, total, exponent, WIDE)
    tl.store(out + row, identity)
    tl.store(out + R + row, label)
    if WIDE:
        tl.store(out + 4 * R + row, tl.where(identity > 0, identity_exponent, 0.0))
        tl.store(out + 5 * R + row, tl.where(label > 0, label_exponent, 0.0))

    identity = tl.zeros((BLOCK_ROWS,), tl.float32)
    label = tl.zeros((BLOCK_ROWS,), tl.float32)
    identity_exponent = tl.full((BLOCK_ROWS,), float("-inf") if WIDE else 0.0, tl.float32)
    label_exponent = identity_exponent
    twins = tl.zeros((BLOCK_ROWS,), tl.float32)
    same_class = tl.zeros((BLOCK_ROWS,), tl.float32)
    for number in range(bulk_end, same_end):
        entry = tl.load(tiles + number)
        block = columns + (entry // 4).to(tl.int64) * BLOCK_COLUMNS * WIDTH
        s, _, _ = similarity(rows, head, tail, block, BLOCK_ROWS, BLOCK_COLUMNS, WIDTH, HEAD, TAIL, RESIDENT, PRECISION)
        same_class += tl.sum(s, 1)
        total, exponent = exp_sum(s * scale, WIDE)
        label, label_exponent = add_sum(label, label_exponent, total, exponent, WIDE)
    STEPS: tl.constexpr = BLOCK_COLUMNS // SPECIAL
    for number in range(mixed_start * STEPS, column_blocks * STEPS):
        start = tl.load(tiles + number // STEPS) // 4 * BLOCK_COLUMNS + number % STEPS * SPECIAL
        block = columns + start.to(tl.int64) * WIDTH
        s, _, _ = similarity(rows, head, tail, block, BLOCK_ROWS, SPECIAL, WIDTH, HEAD, TAIL, RESIDENT, PRECISION)
        in_identity, in_label, twin, same = pair_masks(
            row_keys, column_keys, packed_relations, row, start, R, C, S, HAS_GROUP, SPECIAL
        )
        twins += tl.sum(tl.where(twin, s, 0.0), 1)
        same_class += tl.sum(tl.where(same, s, 0.0), 1)
        s *= scale
        total, exponent = exp_sum(tl.where(in_identity, s, float("-inf")), WIDE)
        identity, identity_exponent = add_sum(identity, identity_exponent, total, exponent, WIDE)
        total, exponent = exp_sum(tl.where(in_label, s, float("-inf")), WIDE)
        label, label_exponent = add_sum(label, label_exponent, total, exponent, WIDE)
    tl.store(out + 2 * R + row, identity)
    tl.store(out + 3 * R + row, label)
    tl.store(out + 8 * R + row, twins)
    tl.store(out + 9 * R + row, same_class)
    if WIDE:
        tl.store(out + 6 * R + row, tl.where(identity > 0, identity_exponent, 0.0))
        tl.store(out + 7 * R + row, tl.where(label > 0, label_exponent, 0.0))


@triton.jit
def load_tile(base, COUNT: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr):
    """(COUNT, PART) of rows that lie WIDTH apart from `base` on."""
    return tl.load(base + tl.arange(0, COUNT)[:, None] * WIDTH + tl.arange(0, PART)[None, :])


@triton.jit
def load_rows(
    base, COUNT: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, RESIDENT: tl.constexpr
):
    """Whole rows in two parts, powers of two wide, as Triton wants them; what is not there repeats the first part."""
    head = load_tile(base, COUNT, WIDTH, HEAD) if RESIDENT else 0.0
    tail = load_tile(base + HEAD, COUNT, WIDTH, TAIL) if RESIDENT and TAIL > 0 else head
    return head, tail


@triton.jit
def similarity(
    rows,
    head,
    tail,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_COLUMNS) float32 inner products, and the parts of the columns where they are resident."""
    column_head, column_tail = load_rows(columns, BLOCK_COLUMNS, WIDTH, HEAD, TAIL, RESIDENT)
    if RESIDENT:
        s = tl.dot(head, tl.trans(column_head), input_precision=PRECISION)
        if TAIL > 0:
            s = tl.dot(tail, tl.trans(column_tail), s, input_precision=PRECISION)
    else:
        s = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for start in range(0, WIDTH, HEAD):
            row_part = load_tile(rows + start, BLOCK_ROWS, WIDTH, HEAD)
            column_part = load_tile(columns + start, BLOCK_COLUMNS, WIDTH, HEAD)
            s = tl.dot(row_part, tl.trans(column_part), s, input_precision=PRECISION)
    return s, column_head, column_tail


@triton.jit
def exp_sum(s, WIDE: tl.constexpr):
    """Σ_j 2^(s_ij − exponent_i) of a tile and the exponent: the largest s of the row if WIDE, else 0."""
    if WIDE:
        exponent = tl.max(s, 1)
        # A row without members has −inf, and −inf − −inf is no number.
        total = tl.sum(tl.exp2(s - tl.where(exponent > float("-inf"), exponent, 0.0)[:, None]), 1)
    else:
        total = tl.sum(tl.exp2(s), 1)
        exponent = tl.zeros_like(total)
    return total, exponent


@triton.jit
def add_sum(total, exponent, more, more_exponent, WIDE: tl.constexpr):
    """total · 2^exponent + more · 2^more_exponent, and its exponent."""
    if WIDE:
        largest = tl.maximum(exponent, tl.where(more > 0, more_exponent, float("-inf")))
        reference = tl.where(largest > float("-inf"), largest, 0.0)
        total = total * tl.exp2(exponent - reference) + more * tl.exp2(tl.minimum(more_exponent - reference, 0.0))
        exponent = largest
    else:
        total += more
    return total, exponent


@triton.jit
def pair_masks(
    row_keys, column_keys, packed_relations, row, start, R, C, S, HAS_GROUP: tl.constexpr, SPECIAL: tl.constexpr
):
    """Of pairs with the SPECIAL columns from `start` on: members of both relations, then positives of both.

    Sorted columns hold consecutive sets, so a word of packed relations has a row's relations with all of them, and no
    table is looked up for a pair.
    """
    column = start + tl.arange(0, SPECIAL)
    column_set = tl.load(column_keys + column)
    first_set = tl.maximum(tl.load(column_keys + start), 0)  # of a step with rows at all the first is one
    row_set = tl.maximum(tl.load(row_keys + row), 0)
    word = tl.load(packed_relations + row_set.to(tl.int64) * S + first_set)
    shift = 2 * tl.maximum(column_set - first_set, 0)  # padding has set −1
    relation = (word[:, None] >> shift[None, :]) & 3
    real = (tl.load(row_keys + 3 * R + row)[:, None] != tl.load(column_keys + 3 * C + column)[None, :]) & (
        column_set >= 0
    )[None, :]
    twin = tl.load(row_keys + R + row)[:, None] == tl.load(column_keys + C + column)[None, :]
    linked = twin
    if HAS_GROUP:
        linked |= tl.load(row_keys + 2 * R + row)[:, None] == tl.load(column_keys + 2 * C + column)[None, :]
    twin &= real
    same = (relation == 2) & real
    in_identity = twin | ((relation % 2 == 1) & ~linked & real)  # OPEN or DIFF
    in_label = same | ((relation == 3) & ~linked & real)
    return in_identity, in_label, twin, same
