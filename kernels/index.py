"""What the rows of a batch are to each other, as the Triton kernels want to know it: made on the device, without
waiting for it, in a dozen launches at any number of rows.

Legend: N rows, S candidate sets, E = S + 1. Sets with the same classes count as one, the first of them. Those that
present rows have are numbered without gaps, in the order in which rows are sorted: their *places*. What is kept of
relations is by place, and empty behind the last place taken.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Columns of a mixed tile that are masked at a time: they hold at most so many sets, whose relations, two bits each,
#: fit in one word.
SPECIAL = 16

ABSENT = tl.constexpr(0x7FFFFFFF << 32)  #: sorts behind all rows that are present
BLOCK = 512  #: rows that a program looks at


class Index(NamedTuple):
    """All rows of a batch, of all processes."""

    numbers: Tensor  #: (1 or 2, N) int32, equal for twins only, and where there are groups, within a group only
    sort_key: Tensor  #: (N,) int64, candidate set · 2³² + number of the identity, ABSENT of rows that are not present
    sorted_key: Tensor  #: (N,) int64, the same in order
    order: Tensor  #: (N,) int64, where each sorted row comes from
    common: Tensor  #: (S, S) float32, how many classes two sets share
    set_rows: Tensor  #: (S,) int32, how many present rows have a set
    place: Tensor  #: (S,) int32, of a set; what rows do not have is undefined
    packed_relations: (
        Tensor  #: (S, W) int32: [a, w] has the relations of place a with places 16 w to 16 w + 15, 2 bits each
    )
    areas: Tensor  #: (3, E, E) int32: how many pairs of places a' < a, b' < b are OPEN, SAME, DIFF
    positives: Tensor  #: (2, N) int32, how many positives a row has, of the identity and of the label relation
    weight: Tensor  #: (2, N) float64, a row's weight as anchor of either relation, 0 if it is none
    totals: (
        Tensor  #: (7,) float64, of both relations Σ weight, then anchors, then Σ weight · log positives; at last the
    )
    #: largest part that a row has in the loss

    @property
    def has_group(self) -> bool:
        return len(self.numbers) == 2


def make_index(
    identity: Tensor,
    candidate_set: Tensor,
    set_table: Tensor,
    group: Tensor | None,
    row_weight: Tensor | None,
    present: Tensor | None,
    weights: tuple[float, float],
) -> Index:
    """Number, sort and weigh rows; arguments as of :func:`mixcl_dist.kernels.mixed_contrastive_loss`.

    Args:
        weights: of the identity and of the label relation.
    """
    rows, sets, device = len(identity), len(set_table), identity.device
    grid = (triton.cdiv(rows, BLOCK),)
    set_classes = set_table.float()
    common = set_classes @ set_classes.T  # how many classes two sets share: exact in any precision
    first_equal = torch.empty(sets, dtype=torch.int32, device=device)
    keys = torch.empty(1 if group is None else 2, rows, dtype=torch.int64, device=device)
    sort_key = torch.empty_like(keys[0])
    numbers = torch.empty_like(keys, dtype=torch.int32)
    positives = torch.empty(2, rows, dtype=torch.int32, device=device)
    _first_equal_kernel[(triton.cdiv(sets, 16),)](common, first_equal, sets)
    _key_kernel[grid](identity, group, present, keys, rows)
    in_order, order = keys.sort(dim=1)
    _number_kernel[(*grid, len(keys))](
        in_order, order, candidate_set, present, first_equal, numbers, sort_key, positives, rows, sets
    )
    sorted_key, order = sort_key.sort(stable=True)
    count = _count(sorted_key, sets)
    relations = _relate(common, count, count)
    weight = torch.empty(2, rows, dtype=torch.float64, device=device)
    parts = torch.empty(8, *grid, dtype=torch.float64, device=device)
    totals = torch.empty(7, dtype=torch.float64, device=device)
    _weigh_kernel[grid](
        sort_key, count, row_weight, common, positives, weight, parts, rows, sets, ACTIVE=active_bits(weights)
    )
    _total_kernel[(1,)](parts, totals, *grid, *weights)
    return Index(numbers, sort_key, sorted_key, order, common, count, *relations, positives, weight, totals)


def for_columns(index: Index, which: slice) -> Index:
    """The index for a sweep over some of the rows as columns: their sets have places of their own, without gaps.

    A mixed tile counts on that for its columns, see SPECIAL.
    """
    count = _count(index.sort_key[which].sort().values, len(index.set_rows))
    place, packed_relations, areas = _relate(index.common, index.set_rows, count)
    return index._replace(place=place, packed_relations=packed_relations, areas=areas)


def packed_width(sets: int) -> int:
    """Words of packed relations: one more than hold them, as 16 places begin in one word and end in the next."""
    return triton.cdiv(sets, SPECIAL) + 1


def _count(sorted_key: Tensor, sets: int) -> Tensor:
    count = torch.empty(sets, dtype=torch.int32, device=sorted_key.device)
    _count_kernel[(triton.cdiv(sets, BLOCK),)](sorted_key, count, len(sorted_key), sets)
    return count


def _relate(common: Tensor, row_count: Tensor, column_count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the columns' sets, and how rows' places are related to them, packed and as areas."""
    sets = len(common)
    place, packed = torch.empty_like(row_count), row_count.new_empty(sets, packed_width(sets))
    areas = torch.zeros(3, sets + 1, sets + 1, dtype=torch.int32, device=common.device)
    taken = place.new_zeros(1)  # where nobody is present
    _relation_kernel[(sets,)](common, row_count, column_count, place, taken, areas, sets)
    _pack_kernel[(triton.cdiv(packed.numel(), BLOCK),)](areas, taken, packed, sets, packed.shape[1], num_warps=8)
    return place, packed, areas.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)


def active_bits(weights: tuple[float, float]) -> int:
    """Bits of the relations that are switched on: 0b01 identity, 0b10 label."""
    return sum((weight > 0) << relation for relation, weight in enumerate(weights))


@triton.jit
def lower_bound(values, count, key):
    """The first place in `values`, which are sorted, that holds `key` or more."""
    low = tl.zeros_like(key).to(tl.int32)
    high = low + count
    span = count
    while span > 0:
        span //= 2
        middle = low + (high - low) // 2
        below = (low < high) & (tl.load(values + middle, mask=low < high, other=0) < key)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    return low


@triton.jit(do_not_specialize=["S"])
def _first_equal_kernel(common, first_equal, S, BLOCK: tl.constexpr = 16, CHUNK: tl.constexpr = 128):
    """Of each set the first one with the same classes."""
    a = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(common + a * (S + 1), mask=a < S, other=0)
    first = a
    for start in range(0, tl.minimum((tl.program_id(0) + 1) * BLOCK, S), CHUNK):
        b = start + tl.arange(0, CHUNK)
        sizes = tl.load(common + b * (S + 1), mask=b < S, other=-1)
        shared = tl.load(common + a[:, None] * S + b[None, :], mask=(a < S)[:, None] & (b < S)[None, :], other=-1)
        equal = (shared == size[:, None]) & (shared == sizes[None, :])
        first = tl.minimum(first, tl.min(tl.where(equal, b[None, :], S), 1))
    tl.store(first_equal + a, first, mask=a < S)


@triton.jit(do_not_specialize=["N"])
def _key_kernel(identity, group, present, keys, N, BLOCK: tl.constexpr = BLOCK):
    """Identities and groups, with a number of its own, below 0, for a row that has none or is not present."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = row < N
    is_present = real
    if present is not None:
        is_present &= tl.load(present + row, mask=real, other=0) != 0
    alone = -1 - row.to(tl.int64)
    key = tl.load(identity + row, mask=real, other=-1)
    tl.store(keys + row, tl.where(is_present & (key >= 0), key, alone), mask=real)
    if group is not None:
        key = tl.load(group + row, mask=real, other=-1).to(tl.int64)
        tl.store(keys + N + row, tl.where(is_present & (key >= 0), key, alone), mask=real)


@triton.jit(do_not_specialize=["N", "S"])
def _number_kernel(
    in_order,  # (1 or 2, N) int64 identities, groups
    order,  # (1 or 2, N) int64
    candidate_set,
    present,
    first_equal,
    numbers,
    sort_key,
    positives,
    N,
    S,
    BLOCK: tl.constexpr = BLOCK,
):
    """Number keys by where they begin in order; count twins, and join set and identity to the key to sort by."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kind = tl.program_id(1)  # identity, group
    in_order += kind * N
    order += kind * N
    real = place < N
    key = tl.load(in_order + place, mask=real, other=0)
    first = lower_bound(in_order, N, key)
    row = tl.load(order + place, mask=real, other=0)
    tl.store(numbers + kind * N + row, first, mask=real)
    if kind == 0:
        tl.store(positives + row, lower_bound(in_order, N, key + 1) - first - 1, mask=real)
        named = tl.load(candidate_set + row, mask=real, other=0)
        named = tl.minimum(tl.maximum(named, 0), S - 1)  # unchecked on a GPU, but it must not read elsewhere
        joined = (tl.load(first_equal + named).to(tl.int64) << 32) + first
        if present is not None:
            joined = tl.where(tl.load(present + row, mask=real, other=0) != 0, joined, ABSENT)
        tl.store(sort_key + row, joined, mask=real)


@triton.jit(do_not_specialize=["N", "S"])
def _count_kernel(sorted_key, count, N, S, BLOCK: tl.constexpr = BLOCK):
    """How many present rows each set has."""
    a = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = a.to(tl.int64) << 32
    tl.store(count + a, lower_bound(sorted_key, N, key + (1 << 32)) - lower_bound(sorted_key, N, key), mask=a < S)


@triton.jit(do_not_specialize=["S"])
def _relation_kernel(common, row_count, column_count, places, taken, areas, S, CHUNK: tl.constexpr = 256):
    """Places of the columns' sets, how many the rows' sets take, and in `areas` how a row's and a column's relate."""
    a = tl.program_id(0)
    if tl.load(row_count + a) == 0:
        return
    place = tl.zeros((), tl.int32)
    behind = tl.zeros((), tl.int32)
    as_column = tl.zeros((), tl.int32)
    for start in range(0, S, CHUNK):
        b = start + tl.arange(0, CHUNK)
        has = (tl.load(row_count + b, mask=b < S, other=0) > 0).to(tl.int32)
        place += tl.sum(tl.where(b < a, has, 0), 0)
        behind += tl.sum(tl.where(b < a, 0, has), 0)
        as_column += tl.sum((tl.load(column_count + b, mask=b < a, other=0) > 0).to(tl.int32), 0)
    tl.store(places + a, as_column)
    tl.store(taken, place + behind)
    E = S + 1
    size = tl.load(common + a * S + a)
    before = tl.zeros((), tl.int32)
    for start in range(0, S, CHUNK):
        b = start + tl.arange(0, CHUNK)
        has = tl.load(column_count + b, mask=b < S, other=0) > 0
        shared = tl.load(common + a * S + b, mask=has, other=0)
        sizes = size + tl.load(common + b * S + b, mask=has, other=0)
        relation = tl.where(shared == 0, 3, tl.where(sizes == 2, 2, 1))  # DIFF, SAME, OPEN
        column = before + tl.cumsum(has.to(tl.int32), 0) - 1
        before += tl.sum(has.to(tl.int32), 0)
        tl.store(areas + ((relation - 1) * E + place + 1) * E + column + 1, 1, mask=has)


@triton.jit(do_not_specialize=["S", "words"])
def _pack_kernel(is_relation, taken, packed, S, words, BLOCK: tl.constexpr = BLOCK, SPECIAL: tl.constexpr = SPECIAL):
    if tl.program_id(0) * BLOCK >= tl.load(taken) * words:
        return
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, first = number // words, number % words * SPECIAL
    E = S + 1
    step = tl.arange(0, SPECIAL)[None, :]
    b = first[:, None] + step
    relation = tl.zeros((BLOCK, SPECIAL), tl.int32)
    for kind in tl.static_range(3):
        place = (kind * E + a[:, None] + 1) * E + b + 1
        relation += (kind + 1) * tl.load(is_relation + place, mask=(a < S)[:, None] & (b < S), other=0)
    tl.store(packed + number, tl.sum(relation << 2 * step, 1), mask=a < S)


@triton.jit(do_not_specialize=["N", "S"])
def _weigh_kernel(
    sort_key,
    count,
    row_weight,
    common,
    positives,  # (2, N) int32
    weights,  # (2, N) float64
    parts,  # (8, programs) float64
    N,
    S,
    ACTIVE: tl.constexpr,
    BLOCK: tl.constexpr = BLOCK,
):
    """Positives and weights of both relations' anchors, and what those of a block add to the totals."""
    block = tl.program_id(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    real = row < N
    key = tl.load(sort_key + row, mask=real, other=ABSENT)
    is_present = key != ABSENT
    a = tl.where(is_present, key >> 32, 0)
    alike = tl.where(tl.load(common + a * S + a) == 1, tl.load(count + a) - 1, 0)
    weight = tl.full((BLOCK,), 1, tl.float64)
    if row_weight is not None:
        weight = tl.load(row_weight + row, mask=real, other=0).to(tl.float64)
    part = parts + block
    programs = tl.num_programs(0)
    for relation in tl.static_range(2):
        number = tl.load(positives + row, mask=real, other=0) if relation == 0 else alike
        number = tl.where(is_present, number, 0) * (ACTIVE >> relation & 1)
        anchor = number > 0
        own = tl.where(anchor, weight, 0.0)
        tl.store(positives + relation * N + row, number, mask=real)
        tl.store(weights + relation * N + row, own, mask=real)
        tl.store(part + relation * programs, tl.sum(own, 0))
        tl.store(part + (2 + relation) * programs, tl.sum(anchor.to(tl.float64), 0))
        floor = own * tl.log(tl.maximum(number, 1).to(tl.float64))
        tl.store(part + (4 + relation) * programs, tl.sum(floor, 0))
        tl.store(part + (6 + relation) * programs, tl.max(own, 0))


@triton.jit(do_not_specialize=["programs"])
def _total_kernel(parts, totals, programs, identity_weight, label_weight, BLOCK: tl.constexpr = 1024):
    largest = tl.zeros((), tl.float64)
    for relation in tl.static_range(2):
        for value in tl.static_range(3):
            total = tl.zeros((), tl.float64)
            most = tl.zeros((), tl.float64)
            for start in range(0, programs, BLOCK):
                block = start + tl.arange(0, BLOCK)
                part = parts + (2 * value + relation) * programs + block
                total += tl.sum(tl.load(part, mask=block < programs, other=0), 0)
                if value == 0:
                    part = parts + (6 + relation) * programs + block
                    most = tl.maximum(most, tl.max(tl.load(part, mask=block < programs, other=0), 0))
            tl.store(totals + 2 * value + relation, total)
            if value == 0:
                share = share_of(most, total)
                largest = tl.maximum(largest, share * (identity_weight if relation == 0 else label_weight))
    tl.store(totals + 6, largest)


@triton.jit
def share_of(part, total):
    """part / total; 0 of 0, which is the total of a relation without anchors."""
    return part / tl.maximum(total, 1e-300)
