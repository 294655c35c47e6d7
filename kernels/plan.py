"""Which tiles of the similarity matrix are uniform: what the Triton kernels walk through instead of all pairs.

Rows and columns are sorted by candidate set and identity. A tile is uniform where all its pairs stand in one relation
and none is linked by an identity or a group. Each block of rows has one list of column blocks: uniform OPEN and DIFF
tiles (`bulk`) at its front, uniform SAME tiles behind them, mixed tiles, which need masks, from its back. Tiles of no
active relation are left out. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixcl_dist.kernels.implementation import is_interpreted
from mixcl_dist.kernels.relations import Contrast, Keys, occurring_first, sort_order

if TYPE_CHECKING:
    from mixcl_dist.kernels.tuning import Launch, Tile

CHUNK = 512  #: column blocks that one step of the list kernel looks at

#: Columns of a mixed tile that are masked at a time: they hold at most so many sets, whose relations, two bits each,
#: fit in one word.
SPECIAL = 16


class Side(NamedTuple):
    """Sorted rows or columns, padded to whole blocks."""

    order: Tensor  #: (N,) int64, where each sorted row comes from
    embeddings: Tensor  #: (⌈N⌉, ⌈D⌉), padded with zeros
    keys: Tensor  #: (4, ⌈N⌉) int32: candidate set, identity, group, position; −1 on padding


class Plan(NamedTuple):
    """The tiles of each block of rows, and the relations of the sets that occur."""

    tiles: Tensor  #: (blocks of rows, blocks of columns) int32, 4 · block of columns + relation, 0 for a mixed tile
    counts: Tensor  #: (blocks of rows, 3) int32: bulk, SAME, mixed
    packed_relations: Tensor  #: (S, S) int32: [a, b] has the relations of set a with sets b to b + 15, two bits each


def prepare(contrast: Contrast, launch: Launch) -> tuple[Side, Side, Plan]:
    """Sort rows and columns, and list their tiles."""
    rows, row_keys, columns, column_keys, relations, _, active = contrast
    tile = launch.tile
    if columns is not rows:  # sets of sorted columns have to be consecutive, see SPECIAL
        order, place = occurring_first(column_keys.candidate_set, len(relations))
        relations = relations[order][:, order].contiguous()
        row_keys, column_keys = (k._replace(candidate_set=place[k.candidate_set]) for k in (row_keys, column_keys))
    row_side = column_side = sort_side(rows, row_keys, tile.rows, launch.width)
    if columns is not rows or tile.rows % tile.columns:
        column_side = sort_side(columns, column_keys, tile.columns, launch.width)
    has_group = row_keys.group is not None
    return row_side, column_side, plan_tiles(row_side, column_side, relations, active, tile, has_group)


def sort_side(embeddings: Tensor, keys: Keys, block: int, width: int) -> Side:
    """Sort rows, and pad their number to whole blocks and their width to what the kernels load."""
    rows = len(embeddings)
    padded = triton.cdiv(rows, block) * block
    order = sort_order(keys)
    # Triton's interpreter holds bfloat16 as bits, and would multiply those.
    dtype = torch.float32 if is_interpreted() and embeddings.dtype == torch.bfloat16 else embeddings.dtype
    in_order = embeddings.new_zeros(padded, width, dtype=dtype)
    in_order[:rows, : embeddings.shape[1]] = embeddings[order]
    group = keys.identity if keys.group is None else keys.group
    integers = torch.full((4, padded), -1, dtype=torch.int32, device=order.device)
    integers[:, :rows] = torch.stack([keys.candidate_set, keys.identity, group, keys.position])[:, order]
    return Side(order, in_order, integers)


def plan_tiles(rows: Side, columns: Side, relations: Tensor, active: int, tile: Tile, has_group: bool) -> Plan:
    """List the tiles of each block of rows.

    Args:
        relations: (S, S) uint8.
        active: bits of the relations that are switched on.
    """
    row_sets = _set_range(rows, tile.rows, len(relations), whole=False)
    column_sets = _set_range(columns, tile.columns, len(relations), whole=True)
    shape = row_sets.shape[1], column_sets.shape[1]
    linked = relations.new_zeros(shape)
    for key in (1, 2)[: 1 + has_group]:
        _mark_linked(linked, rows, columns, key, tile)
    tiles = torch.empty(shape, dtype=torch.int32, device=linked.device)
    counts = tiles.new_empty(shape[0], 3)
    areas = _areas(relations)
    _list_kernel[(shape[0],)](
        linked, row_sets, column_sets, areas, tiles, counts, *shape, len(relations) + 1, ACTIVE=active, CHUNK=CHUNK
    )
    return Plan(tiles, counts, _pack_relations(relations))


def _set_range(side: Side, block: int, sets: int, *, whole: bool) -> Tensor:
    """(2, blocks) int32: the first and the last set of each block; 0 and ``sets``, which is never uniform, where a
    block that has to be whole has padding."""
    blocks = side.keys[0].view(-1, block)
    first, last = blocks[:, 0], blocks.amax(1)
    if whole:
        padded = blocks[:, -1] < 0
        first, last = first.masked_fill(padded, 0), last.masked_fill(padded, sets)
    return torch.stack([first, last])


def _areas(relations: Tensor) -> Tensor:
    """(3, S + 1, S + 1) int32: how many pairs of sets a' < a, b' < b are OPEN, SAME, DIFF."""
    is_relation = relations == torch.arange(1, 4, device=relations.device).view(3, 1, 1)
    areas = relations.new_zeros((3, len(relations) + 1, len(relations) + 1), dtype=torch.int32)
    areas[:, 1:, 1:] = is_relation.cumsum(1).cumsum(2)
    return areas


def _pack_relations(relations: Tensor) -> Tensor:
    packed = relations.int()
    for step in range(1, SPECIAL):
        packed[:, :-step] |= relations[:, step:].int() << 2 * step
    return packed


def _mark_linked(linked: Tensor, rows: Side, columns: Side, key: int, tile: Tile) -> None:
    """Mark tiles that hold a pair with the same key; so also those of a row with itself."""
    count = len(columns.order)
    in_order, by_key = torch.sort(columns.keys[key, :count], stable=True)
    block = (by_key // tile.columns).int()
    changes = torch.ones(count + 1, dtype=torch.bool, device=linked.device)
    changes[1:-1] = (in_order[1:] != in_order[:-1]) | (block[1:] != block[:-1])
    # From each place the next one with another key or block: a chain of links that visits each block once.
    place = torch.arange(count + 1, device=linked.device, dtype=torch.int32)
    following = torch.where(changes, place, count).flip(0).cummin(0).values.flip(0)[1:].contiguous()
    start = torch.searchsorted(in_order, rows.keys[key], out_int32=True)
    _mark_kernel[(len(linked),)](
        linked, rows.keys[key], start, in_order, block, following, count, linked.shape[1], BLOCK_ROWS=tile.rows
    )


@triton.jit(do_not_specialize=["count", "blocks"])
def _mark_kernel(linked, row_key, start, column_key, block, following, count, blocks, BLOCK_ROWS: tl.constexpr):
    row_block = tl.program_id(0)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    linked += row_block.to(tl.int64) * blocks
    key = tl.load(row_key + row)
    place = tl.load(start + row)
    going = (place < count) & (key >= 0)
    going &= tl.load(column_key + place, mask=going, other=-1) == key
    while tl.max(going.to(tl.int32), 0) > 0:
        tile = tl.load(block + place, mask=going, other=0)
        tl.store(linked + tile, tl.full((BLOCK_ROWS,), 1, tl.uint8), mask=going)
        place = tl.load(following + place, mask=going, other=0)
        going &= place < count
        going &= tl.load(column_key + place, mask=going, other=-1) == key


@triton.jit(do_not_specialize=["row_blocks", "column_blocks", "E"])
def _list_kernel(
    linked,  # (row_blocks, column_blocks) uint8
    row_sets,  # (2, row_blocks) int32, first and last
    column_sets,  # (2, column_blocks) int32
    areas,  # (3, E, E) int32
    tiles,  # (row_blocks, column_blocks) int32
    counts,  # (row_blocks, 3) int32
    row_blocks,
    column_blocks,
    E,
    ACTIVE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row_block = tl.program_id(0)
    linked += row_block.to(tl.int64) * column_blocks
    tiles += row_block.to(tl.int64) * column_blocks
    first_set = tl.load(row_sets + row_block)
    last_set = tl.load(row_sets + row_blocks + row_block)
    height = last_set + 1 - first_set
    top = areas + first_set * E
    bottom = areas + (last_set + 1) * E
    bulk = tl.zeros((), tl.int32)
    same = tl.zeros((), tl.int32)
    mixed = tl.zeros((), tl.int32)
    for part in tl.static_range(2):  # bulk and mixed tiles first, then SAME tiles behind the bulk
        for first in range(0, column_blocks, CHUNK):
            block = first + tl.arange(0, CHUNK)
            real = block < column_blocks
            left = tl.load(column_sets + block, mask=real, other=0)
            right = tl.load(column_sets + column_blocks + block, mask=real, other=0) + 1
            area = height * (right - left)
            relation = tl.zeros((CHUNK,), tl.int32)
            for index in tl.static_range(3):
                corner = index * E * E
                pairs = tl.load(bottom + corner + right, mask=real & (right < E), other=0)
                pairs -= tl.load(top + corner + right, mask=real & (right < E), other=0)
                pairs -= tl.load(bottom + corner + left, mask=real, other=0)
                pairs += tl.load(top + corner + left, mask=real, other=0)
                relation = tl.where(pairs == area, index + 1, relation)
            is_mixed = tl.load(linked + block, mask=real, other=0) > 0
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
