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

from mixcl_dist.kernels.index import Index, share_of
from mixcl_dist.kernels.plan import Plan, Side, own_tiles
from mixcl_dist.kernels.tiled import UNSHIFTED_LIMIT
from mixcl_dist.kernels.tuning import Launch

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
WIDE_FROM = tl.constexpr(UNSHIFTED_LIMIT)


def sweep(
    rows: Side, columns: Side, plan: Plan, rest: Plan, index: Index, temperature: Tensor, launch: Launch
) -> Tensor:
    """(10, R) float32: every sorted row's sums over these columns, in the parts that the kernel keeps apart.

    Args:
        rest: what is swept of the plan where no exponential can leave float32.
    """
    out = torch.empty(10, rows.keys.shape[1], dtype=torch.float32, device=temperature.device)
    for is_wide, listed in ((False, rest), (True, plan)):
        forward_kernel[(len(plan.tiles),)](
            *of_pairs(rows, columns, listed, index, temperature),
            out,
            *lengths(rows, columns, plan, index),
            HAS_GROUP=index.has_group,
            WIDE=is_wide,
            **launch.options(),
        )
    return out


def of_pairs(rows: Side, columns: Side, plan: Plan, index: Index, temperature: Tensor) -> tuple[Tensor, ...]:
    """What a sweep reads of pairs, the kernels' first arguments."""
    return (
        rows.embeddings,
        columns.embeddings,
        rows.keys,
        columns.keys,
        *plan,
        index.packed_relations,
        temperature,
        rows.norm,
        columns.norm,
    )


def lengths(rows: Side, columns: Side, plan: Plan, index: Index) -> tuple[int, int, int, int]:
    """R, C, the columns of the plan's table and the words of a set's packed relations."""
    return rows.keys.shape[1], columns.keys.shape[1], plan.tiles.shape[1], index.packed_relations.shape[1]


def fold(out: Tensor, earlier: Tensor | None) -> Tensor:
    """(4, R) float64: log₂ of both relations' sums, and both sums over positives, those of earlier columns included."""
    sums = out.new_empty(4, out.shape[1], dtype=torch.float64)
    _fold_kernel[(triton.cdiv(out.shape[1], 256),)](out, earlier, sums, out.shape[1])
    return sums


def finish(
    out: Tensor,
    earlier: Tensor | None,
    rows: Side,
    index: Index,
    own: slice,
    temperature: Tensor,
    active: int,
    lse: Tensor,
) -> Tensor:
    """The rows' log-sum-exps, and what the rows add to the loss.

    Args:
        out, earlier: the sums over the last columns, and over those before.
        own: which rows of the batch these are.
        active: bits of the relations that are switched on.
        lse: (2, n) float64, filled in the rows' own order.

    Returns:
        (4,) float64, what they add to both relations' losses, then to both similarities; NaN where a row is not finite.
    """
    grid = (triton.cdiv(out.shape[1], 256),)
    parts = out.new_empty(4, *grid, dtype=torch.float64)
    _finish_kernel[grid](
        out,
        earlier,
        rows.keys,
        rows.norm,
        index.positives,
        index.weight,
        index.totals,
        temperature,
        lse,
        parts,
        out.shape[1],
        lse.shape[1],
        len(index.order),
        own.start or 0,
        ACTIVE=active,
    )
    return parts.sum(1)


@triton.jit
def log2_of(total):
    """log₂, −inf of 0."""
    return tl.where(total == 0, float("-inf"), tl.log2(tl.where(total == 0, 1, total).to(tl.float64)))


@triton.jit
def add_log2(a, b):
    """log₂(2^a + 2^b)."""
    largest = tl.maximum(a, b)
    reference = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
    return reference + log2_of(tl.exp2(a - reference) + tl.exp2(b - reference))


@triton.jit
def relation_sums(out, earlier, row, real, R, relation: tl.constexpr):
    """log₂ of a relation's sum of 2^s, and its sum over positives, both float64."""
    at = relation * R + row
    bulk = log2_of(tl.load(out + at, mask=real, other=0)) + tl.load(out + 4 * R + at, mask=real, other=0)
    special = log2_of(tl.load(out + 2 * R + at, mask=real, other=0)) + tl.load(out + 6 * R + at, mask=real, other=0)
    total = add_log2(bulk, special)
    positive = tl.load(out + 8 * R + at, mask=real, other=0).to(tl.float64)
    if earlier is not None:
        total = add_log2(total, tl.load(earlier + at, mask=real, other=0))
        positive += tl.load(earlier + 2 * R + at, mask=real, other=0)
    return total, positive


@triton.jit(do_not_specialize=["R"])
def _fold_kernel(out, earlier, sums, R, BLOCK: tl.constexpr = 256):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = row < R
    for relation in tl.static_range(2):
        total, positive = relation_sums(out, earlier, row, real, R, relation)
        tl.store(sums + relation * R + row, total, mask=real)
        tl.store(sums + (2 + relation) * R + row, positive, mask=real)


@triton.jit(do_not_specialize=["R", "count", "N", "first_row"])
def _finish_kernel(
    out,  # (10, R) float32
    earlier,  # (4, R) float64 or None
    keys,  # (4, R) int32
    norm,  # 0-d float32
    positives,  # (2, N) int32
    weights,  # (2, N) float64
    totals,  # float64
    temperature,
    lse,  # (2, count) float64
    parts,  # (4, programs) float64
    R,
    count,
    N,
    first_row,
    ACTIVE: tl.constexpr,
    BLOCK: tl.constexpr = 256,
):
    part = parts + tl.program_id(0)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = row < R
    is_present = tl.load(keys + row, mask=real, other=-1) >= 0
    position = tl.load(keys + 3 * R + row, mask=real, other=-1)
    poison = tl.load(norm) * 0.0  # NaN where a row is not finite, also one that no other row sees
    for relation in tl.static_range(2):
        total, positive = relation_sums(out, earlier, row, real, R, relation)
        total = tl.where(is_present & ((ACTIVE >> relation & 1) > 0), total * LN2, float("-inf"))
        tl.store(lse + relation * count + position - first_row, total, mask=position >= 0)
        number = tl.load(positives + relation * N + position, mask=is_present, other=0)
        weight = tl.load(weights + relation * N + position, mask=is_present, other=0)
        share = share_of(weight, tl.load(totals + relation))
        cosine = tl.where(number > 0, share * positive / tl.maximum(number, 1), 0.0)
        term = share * tl.where(number > 0, total, 0.0) - cosine / tl.load(temperature)
        tl.store(part + relation * tl.num_programs(0), tl.sum(term, 0) + poison)
        tl.store(part + (2 + relation) * tl.num_programs(0), tl.sum(cosine, 0))


@triton.jit(do_not_specialize=["column_blocks", "words"])
def forward_kernel(
    rows,  # (R, WIDTH) embeddings
    columns,  # (C, WIDTH)
    row_keys,  # (4, R) int32
    column_keys,  # (4, C)
    tiles,  # (R / BLOCK_ROWS, column_blocks) int32
    counts,  # (R / BLOCK_ROWS, 3) int32: bulk, SAME and mixed tiles
    packed_relations,  # (S, words) int32
    temperature,  # 0-d float32
    row_norm,  # 0-d float32, the largest length of a row
    column_norm,
    out,  # (10, R) float32
    R,
    C,
    column_blocks,
    words,
    HAS_GROUP: tl.constexpr,
    WIDE: tl.constexpr,  # the variant where exponentials could leave float32; the other one returns at once
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SPECIAL: tl.constexpr,  # columns of a mixed tile at a time: masks take registers
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,  # a row is loaded whole as HEAD + TAIL, or in steps of HEAD if RESIDENT is false
    TAIL: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale = 1 / tl.load(temperature) * LOG2E
    if is_wide(row_norm, column_norm, temperature) != WIDE:
        return
    row_block, tiles, bulk_end, same_end, mixed_start = own_tiles(tiles, counts, column_blocks)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows += row_block.to(tl.int64) * BLOCK_ROWS * WIDTH
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
            row_keys, column_keys, packed_relations, row, start, R, C, words, HAS_GROUP, SPECIAL
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
    tl.store(out + 6 * R + row, tl.where(identity > 0, identity_exponent, 0.0))
    tl.store(out + 7 * R + row, tl.where(label > 0, label_exponent, 0.0))


@triton.jit
def is_wide(row_norm, column_norm, temperature):
    return tl.load(row_norm) * tl.load(column_norm) / tl.load(temperature) >= WIDE_FROM


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
    row_keys, column_keys, packed_relations, row, start, R, C, words, HAS_GROUP: tl.constexpr, SPECIAL: tl.constexpr
):
    """Of pairs with the SPECIAL columns from `start` on: members of both relations, then positives of both.

    Sorted columns hold consecutive sets, so two words of packed relations have a row's relations with all of them, and
    no table is looked up for a pair.
    """
    column = start + tl.arange(0, SPECIAL)
    column_set = tl.load(column_keys + column)
    first_set = tl.maximum(tl.load(column_keys + start), 0)  # of a step with rows at all the first is one
    row_set = tl.maximum(tl.load(row_keys + row), 0)
    words_of_row = packed_relations + row_set.to(tl.int64) * words + first_set // SPECIAL
    low, high = tl.load(words_of_row).to(tl.int64) & 0xFFFFFFFF, tl.load(words_of_row + 1).to(tl.int64) << 32
    word = ((low | high) >> 2 * (first_set % SPECIAL)).to(tl.int32)
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
