from __future__ import annotations

import pytest
import torch

from mixcl_dist.kernels.index import SPECIAL, make_index
from mixcl_dist.kernels.plan import plan_tiles, sort_side
from mixcl_dist.kernels.relations import DIFF, OPEN, SAME
from mixcl_dist.kernels.tuning import Tile

TILE = Tile(32, 16, 4, 1)
#: Two single classes, two disjoint pairs of classes, anything, and a set that no row has.
TABLE = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)


def plan(
    candidate_set: list[int],
    identity: torch.Tensor,
    group: torch.Tensor | None = None,
    active: int = 0b11,
    present: torch.Tensor | None = None,
):
    """The tiles of a batch with itself, as a matrix of relations, 0 for mixed and −1 for those left out."""
    count = len(identity)
    index = make_index(identity, torch.tensor(candidate_set), TABLE, group, None, present, (1.0, 1.0))
    embeddings = torch.arange(count, dtype=torch.float32)[:, None].repeat(1, 16)
    rows, columns = (
        sort_side(embeddings, index, slice(None), -(-count // block) * block, 16) for block in (TILE.rows, TILE.columns)
    )
    tiles, counts = plan_tiles(rows, columns, index.areas, active, TILE)
    matrix = torch.full_like(tiles, -1)
    for listed, line, (bulk, same, mixed) in zip(tiles, matrix, counts.tolist(), strict=True):
        for first, last, kinds in (
            (0, bulk, {OPEN, DIFF}),
            (bulk, bulk + same, {SAME}),
            (len(listed) - mixed, len(listed), {0}),
        ):
            assert {entry % 4 for entry in listed[first:last].tolist()} <= kinds
            line[listed[first:last] // 4] = listed[first:last] % 4
    return matrix, rows, columns


def expected(rows, columns, candidate_set: torch.Tensor, active: int, group: bool) -> torch.Tensor:
    """The same from the definition, pair by pair."""
    row_set, identity, group_of, _ = rows.keys[:, :, None]
    column_set, column_identity, column_group, _ = columns.keys[:, None, :]
    relation = torch.where(column_set >= 0, relation_of_pairs(rows, columns, candidate_set), 0)
    linked = (identity == column_identity) & (identity >= 0)
    if group:
        linked |= (group_of == column_group) & (group_of >= 0)
    relation = torch.where(linked, 0, relation)
    relation = torch.where(row_set >= 0, relation, -9)  # rows that are not there are never looked at
    blocks = relation.unflatten(0, (-1, TILE.rows)).unflatten(2, (-1, TILE.columns)).transpose(1, 2).flatten(2)
    low, high = torch.where(blocks == -9, 9, blocks).amin(2), blocks.amax(2)
    uniform = torch.where(low == high, high, 0)
    nobody = (high == -9) | ~(columns.keys[0] >= 0).view(1, -1, TILE.columns).any(2)
    uniform = torch.where(nobody, -1, uniform)
    return torch.where((uniform > 0) & (uniform & active == 0), -1, uniform).int()


def relation_of_pairs(rows, columns, candidate_set: torch.Tensor) -> torch.Tensor:
    """Of each pair of sorted rows, from the table of classes itself."""
    row, column = (TABLE[candidate_set[side.keys[3].clamp(min=0)]] for side in (rows, columns))
    common = row.float() @ column.float().T
    single = (row.sum(1) == 1)[:, None] & (column.sum(1) == 1)[None, :]
    return torch.where(common == 0, DIFF, torch.where(single, SAME, OPEN))


@pytest.mark.parametrize("active", [0b01, 0b10, 0b11])
@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("rows", [1, 16, 100, 128, 203])
def test_every_tile_is_listed_as_what_it_is(rows, group, active):
    generator = torch.Generator().manual_seed(rows)
    candidate_set = torch.randint(4, (rows,), generator=generator)
    identity = torch.randint(-1, rows // 2 + 1, (rows,), generator=generator)
    groups = torch.where(torch.arange(rows) < 12, torch.arange(rows) // 6, -1) if group else None
    got, row_side, column_side = plan(candidate_set.tolist(), identity, groups, active)
    assert torch.equal(got, expected(row_side, column_side, candidate_set, active, group))


@pytest.mark.parametrize("rows", [40, 200])
def test_rows_that_are_not_present_come_last_and_count_as_padding(rows):
    generator = torch.Generator().manual_seed(rows)
    candidate_set, identity = torch.randint(4, (rows,), generator=generator), torch.arange(rows) // 2
    present = torch.rand(rows, generator=generator) > 0.4
    got, row_side, column_side = plan(candidate_set.tolist(), identity, present=present)
    assert torch.equal(got, expected(row_side, column_side, candidate_set, 0b11, False))
    place, *_, position = row_side.keys
    assert (place[: present.sum()] >= 0).all() and (place[present.sum() :] == -1).all()
    assert sorted(position[:rows].tolist()) == list(range(rows)) and (position[rows:] == -1).all()
    assert (row_side.embeddings[present.sum() :] == 0).all()


def test_twins_of_one_set_leave_all_tiles_off_the_diagonal_uniform():
    got, *_ = plan([0] * 64 + [1] * 64 + [3] * 64, torch.arange(192) // 2)
    here = torch.arange(192 // TILE.rows)[:, None] == torch.arange(192 // TILE.columns) * TILE.columns // TILE.rows
    assert torch.equal(got == 0, here)


def test_one_group_of_all_rows_makes_all_tiles_mixed():
    got, *_ = plan([0] * 100, torch.arange(100), torch.zeros(100, dtype=torch.int64))
    assert not got.any()


def test_a_step_of_sorted_columns_holds_consecutive_sets():
    """So the relations of a row with all of them fit in one word."""
    sets = torch.randint(40, (300,), generator=torch.Generator().manual_seed(0)) * 3
    table = torch.eye(120, dtype=torch.bool)
    index = make_index(torch.arange(300), sets, table, None, None, None, (1.0, 1.0))
    in_order = sort_side(torch.zeros(300, 16), index, slice(None), 304, 16).keys[0]
    steps = in_order.view(-1, SPECIAL)
    assert ((steps.amax(1) - steps[:, 0]) < SPECIAL).all() and in_order.max() < 40
