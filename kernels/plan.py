"""Which tiles of the similarity matrix are uniform: what the Triton kernels walk through instead of all pairs.

Rows and columns are sorted by candidate set and identity. A tile is uniform where all its pairs stand in one relation
and none is linked by an identity or a group. Each block of rows has one list of column blocks: uniform OPEN and DIFF
tiles (`bulk`) at its front, uniform SAME tiles behind them, mixed tiles, which need masks, from its back. Tiles of no
active relation are left out. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixcl_dist.kernels.implementation import held_dtype
from mixcl_dist.kernels.index import ABSENT, Index, lower_bound
from mixcl_dist.kernels.tuning import Tile

CHUNK = 512  #: column blocks that one step of the list kernel looks at


class Side(NamedTuple):
    """Sorted rows or columns, padded to whole blocks (R of them); those that are not present come last."""

    embeddings: Tensor  #: (R, width), zeros where nothing is present
    keys: Tensor  #: (4, R) int32: place of the set, −1 where nothing is present; identity, group; position in
    #: the batch, −1 on padding
    links: Tensor  #: (1 or 2, N) int64 in order, number of the identity or group · 2³² + sorted row, for those present
    norm: Tensor  #: 0-d float32, the largest length of a row, NaN if a row is not finite


class Plan(NamedTuple):
    """The tiles of each block of rows."""

    tiles: Tensor  #: (blocks of rows, blocks of columns) int32, 4 · block of columns + relation, 0 for a mixed tile
    counts: Tensor  #: (blocks of rows, 3) int32: bulk, SAME, mixed


def sort_side(embeddings: Tensor, index: Index, rows: slice, padded: int, width: int) -> Side:
    """Sort these rows of the index, and pad their number and their width to what the kernels load."""
    count = len(embeddings)
    sorted_key, order = index.sorted_key, index.order
    if count < len(order):
        sorted_key, order = index.sort_key[rows].sort(stable=True)
    in_order = embeddings.new_empty(padded, width, dtype=held_dtype(embeddings.dtype))
    keys = order.new_empty(4, padded, dtype=torch.int32)
    links = order.new_empty(len(index.numbers), count)
    norm = embeddings.new_empty(padded, dtype=torch.float32)
    _gather_kernel[(triton.cdiv(padded, 64),)](
        embeddings,
        *embeddings.stride(),
        sorted_key,
        order,
        index.numbers,
        index.place,
        in_order,
        keys,
        links,
        norm,
        count,
        len(index.order),
        rows.start or 0,
        padded,
        D=embeddings.shape[1],
        WIDTH=width,
        KINDS=len(links),
    )
    return Side(in_order, keys, links.sort(dim=1).values, norm.amax())


def plan_tiles(rows: Side, columns: Side, areas: Tensor, active: int, tile: Tile) -> Plan:
    """List the tiles of each block of rows.

    Args:
        areas: see :class:`mixcl_dist.kernels.index.Index`.
        active: bits of the relations that are switched on.
    """
    shape = rows.keys.shape[1] // tile.rows, columns.keys.shape[1] // tile.columns
    kinds, linkable = columns.links.shape
    linked = torch.zeros(shape, dtype=torch.uint8, device=areas.device)
    tiles = torch.empty(shape, dtype=torch.int32, device=areas.device)
    counts = tiles.new_empty(shape[0], 3)
    sizes = {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    _mark_kernel[(shape[0], kinds)](linked, rows.keys, columns.links, rows.keys.shape[1], linkable, shape[1], **sizes)
    _list_kernel[(shape[0],)](
        linked,
        rows.keys,
        columns.keys,
        areas,
        tiles,
        counts,
        shape[1],
        areas.shape[1],
        ACTIVE=active,
        CHUNK=CHUNK,
        **sizes,
    )
    return Plan(tiles, counts)


@triton.jit(do_not_specialize=["count", "N", "first_row", "R"])
def _gather_kernel(
    embeddings,
    row_stride,
    feature_stride,
    sorted_key,  # (count,) int64
    order,  # (count,) int64
    numbers,  # (KINDS, N) int32, from first_row on
    place,  # (S,) int32
    in_order,  # (R, WIDTH)
    keys,  # (4, R) int32
    links,  # (KINDS, count) int64
    norm,  # (R,) float32
    count,
    N,
    first_row,
    R,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK: tl.constexpr = 64,
    FEATURES: tl.constexpr = 64,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, real = at < R, at < count
    key = tl.load(sorted_key + at, mask=real, other=ABSENT)
    row = tl.load(order + at, mask=real, other=-1)
    is_present = key != ABSENT
    tl.store(keys + at, tl.load(place + (key >> 32), mask=is_present, other=-1), mask=inside)
    tl.store(keys + 3 * R + at, tl.where(real, first_row + row, -1).to(tl.int32), mask=inside)
    for kind in tl.static_range(2):  # without groups identities stand for them
        number = tl.load(numbers + kind % KINDS * N + first_row + row, mask=is_present, other=-1)
        tl.store(keys + (1 + kind) * R + at, number, mask=inside)
        if kind < KINDS:
            link = tl.where(is_present, (number.to(tl.int64) << 32) + at, ABSENT)
            tl.store(links + kind * count + at, link, mask=real)
    square = tl.zeros((BLOCK,), tl.float32)
    nothing = tl.zeros((BLOCK,), tl.float32)  # NaN if a feature is not finite
    for start in range(0, WIDTH, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        source = embeddings + row[:, None] * row_stride + feature[None, :].to(tl.int64) * feature_stride
        values = tl.load(source, mask=is_present[:, None] & (feature < D)[None, :], other=0.0)
        target = in_order + at[:, None].to(tl.int64) * WIDTH + feature[None, :]
        tl.store(target, values, mask=inside[:, None] & (feature < WIDTH)[None, :])
        values = values.to(tl.float32)
        square += tl.sum(values * values, 1)
        nothing += tl.sum(values * 0.0, 1)
    length = tl.where(nothing == 0, tl.minimum(tl.sqrt(square), 1e30), nothing)
    tl.store(norm + at, length, mask=inside)


@triton.jit(do_not_specialize=["R", "linkable", "blocks"])
def _mark_kernel(
    linked,  # (row blocks, blocks) uint8
    row_keys,  # (4, R)
    links,  # (kinds, linkable) int64
    R,
    linkable,
    blocks,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Mark tiles that hold a pair of one identity or group; so also those of a row with itself."""
    row_block, kind = tl.program_id(0), tl.program_id(1)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    links += kind * linkable
    linked += row_block.to(tl.int64) * blocks
    number = tl.load(row_keys + (1 + kind) * R + row).to(tl.int64)
    going = number >= 0
    place = lower_bound(links, linkable, number << 32)
    while tl.max(going.to(tl.int32), 0) > 0:
        link = tl.load(links + place, mask=going & (place < linkable), other=ABSENT)
        going &= (link >> 32) == number
        block = (link & 0xFFFFFFFF).to(tl.int32) // BLOCK_COLUMNS
        tl.store(linked + block, tl.full((BLOCK_ROWS,), 1, tl.uint8), mask=going)
        # The next one in another block.
        place = lower_bound(links, linkable, (number << 32) + (block + 1).to(tl.int64) * BLOCK_COLUMNS)


@triton.jit(do_not_specialize=["column_blocks", "E"])
def _list_kernel(
    linked,  # (row_blocks, column_blocks) uint8
    row_keys,  # (4, R) int32
    column_keys,  # (4, C) int32
    areas,  # (3, E, E) int32
    tiles,  # (row_blocks, column_blocks) int32
    counts,  # (row_blocks, 3) int32
    column_blocks,
    E,
    ACTIVE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row_block = tl.program_id(0)
    linked += row_block.to(tl.int64) * column_blocks
    tiles += row_block.to(tl.int64) * column_blocks
    sets = tl.load(row_keys + row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))
    last_set = tl.max(sets, 0)
    first_set = tl.maximum(tl.load(row_keys + row_block * BLOCK_ROWS), 0)
    height = last_set + 1 - first_set
    top = areas + first_set * E
    bottom = areas + (last_set + 1) * E
    bulk = tl.zeros((), tl.int32)
    same = tl.zeros((), tl.int32)
    mixed = tl.zeros((), tl.int32)
    for part in tl.static_range(2):  # bulk and mixed tiles first, then SAME tiles behind the bulk
        for first in range(0, column_blocks, CHUNK):
            block = first + tl.arange(0, CHUNK)
            inside = block < column_blocks
            left = tl.load(column_keys + block * BLOCK_COLUMNS, mask=inside, other=-1)
            right = tl.load(column_keys + (block + 1) * BLOCK_COLUMNS - 1, mask=inside, other=-1) + 1
            real = (left >= 0) & (last_set >= 0)  # somebody is present on both sides
            whole = real & (right > 0)
            relation = tl.zeros((CHUNK,), tl.int32)
            for index in tl.static_range(3):
                corner = index * E * E
                pairs = tl.load(bottom + corner + right, mask=whole, other=0)
                pairs -= tl.load(top + corner + right, mask=whole, other=0)
                pairs -= tl.load(bottom + corner + left, mask=whole, other=0)
                pairs += tl.load(top + corner + left, mask=whole, other=0)
                relation = tl.where(whole & (pairs == height * (right - left)), index + 1, relation)
            is_mixed = tl.load(linked + block, mask=inside, other=0) > 0
            relation = tl.where(is_mixed, 0, relation)
            is_mixed = real & (relation == 0)
            is_uniform = real & (relation & ACTIVE > 0)
            entry = block * 4 + relation
            if part == 0:
                is_bulk = is_uniform & (relation != 2)
                tl.store(tiles + bulk + tl.cumsum(is_bulk.to(tl.int32), 0) - 1, entry, mask=is_bulk)
                tl.store(tiles + column_blocks - mixed - tl.cumsum(is_mixed.to(tl.int32), 0), entry, mask=is_mixed)
                bulk += tl.sum(is_bulk.to(tl.int32), 0)
                mixed += tl.sum(is_mixed.to(tl.int32), 0)
            else:
                is_same = is_uniform & (relation == 2)
                tl.store(tiles + bulk + same + tl.cumsum(is_same.to(tl.int32), 0) - 1, entry, mask=is_same)
                same += tl.sum(is_same.to(tl.int32), 0)
    tl.store(counts + row_block * 3, bulk)
    tl.store(counts + row_block * 3 + 1, same)
    tl.store(counts + row_block * 3 + 2, mixed)


@triton.jit
def own_tiles(tiles, counts, column_blocks):
    """A program's block of rows, its list of tiles, and where in it bulk and SAME tiles end and mixed ones begin."""
    row_block = tl.program_id(0)
    bulk_end = tl.load(counts + row_block * 3)
    same_end = bulk_end + tl.load(counts + row_block * 3 + 1)
    mixed_start = column_blocks - tl.load(counts + row_block * 3 + 2)
    return row_block, tiles + row_block.to(tl.int64) * column_blocks, bulk_end, same_end, mixed_start
