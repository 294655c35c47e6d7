"""The forward sweep over half of the pairs: what it covers, that it is right, and its exponentials."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch.nn.functional import normalize

from mixcl_dist.kernels import index, mixed_contrastive_loss, plan, small, triangle, tuning
from mixcl_dist.kernels.op import mixed_contrastive

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "kernel"))
import inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Programs that have several blocks each even in small batches, of 32 rows and 16 columns."""
    monkeypatch.setattr(small, "LARGEST", 0)
    monkeypatch.setattr(triangle, "STRIPS", 2)
    monkeypatch.setattr(triangle, "PARTS", 2)
    for key in tuning.TILES:
        if key[0] == "interpreter":
            monkeypatch.setitem(tuning.TILES, key, {1024: tuning.Tile(32, 16, 4, 1, triangle=key[1] == "forward")})


def rows_of_blocks(*, width: int = 16, dtype: torch.dtype = torch.float32, grouped: bool = False) -> inputs.Rows:
    """32 rows of one candidate set after another, and one row more: all kinds of tiles, and most pairs of blocks whole.

    Neighbours are twins; a group, if any, links some rows of the first block and of the fourth.
    """
    sets = [0, 0, 1, 1, 2, 3]
    candidate_set = torch.tensor(sets + sets[-1:]).repeat_interleave(torch.tensor([32] * len(sets) + [1]))
    count = len(candidate_set)
    embeddings = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    group = torch.full((count,), -1)
    group[:5] = group[100:103] = 0
    table = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    return inputs.Rows(
        normalize(embeddings, dim=1).to(DEVICE, dtype),
        (torch.arange(count) // 2).to(DEVICE),
        candidate_set.to(DEVICE),
        table.to(DEVICE),
        group=group.to(DEVICE) if grouped else None,
    )


def planned(rows: inputs.Rows) -> tuple[plan.Side, plan.Plan, tuning.Tile]:
    """The rows in order, and the plan of all their pairs for "forward"."""
    launch = tuning.launch_for(rows.embeddings, "forward")
    weights = rows.identity_weight, rows.label_weight
    found = index.make_index(
        rows.identity, rows.candidate_set, rows.set_table, rows.group, rows.row_weight, None, weights
    )
    padded = -(-len(rows) // launch.tile.rows) * launch.tile.rows
    side = plan.sort_side(rows.embeddings, found, slice(None), padded, launch.width)
    return side, plan.plan_tiles(side, side, found.areas, index.active_bits(weights), launch.tile), launch.tile


def lse(rows: inputs.Rows) -> torch.Tensor:
    """(2, N) float64, of both relations, by the kernels."""
    arguments = rows.embeddings, rows.identity, rows.candidate_set, rows.set_table, rows.group
    temperature = torch.tensor(rows.temperature, device=DEVICE)
    rest = rows.row_weight, None, rows.identity_weight, rows.label_weight, "", "triton"
    return mixed_contrastive(*arguments, temperature, *rest)[2]


@functools.cache
def plain_lse() -> torch.Tensor:
    return lse(rows_of_blocks())


def reference(rows: inputs.Rows) -> torch.Tensor:
    arguments = vars(rows) | {"embeddings": rows.embeddings.double()}
    return mixed_contrastive_loss(**arguments, implementation="reference").lse


# Which pairs


def check_cover(batch: inputs.Rows) -> plan.Plan:
    """That every pair of the plan is made once for each of its rows; returns the rest of the plan."""
    side, listed, tile = planned(batch)
    divided = triangle.divide(listed, side, tile)
    made = relations_by_tile(divided.rest)
    ratio = tile.rows // tile.columns
    for own, parts in enumerate(divided.pairs):
        for part, others in enumerate(parts):
            differing, open_pairs = divided.pair_counts[own, part].tolist()
            for relation, others_of_it in ((3, others[:differing]), (1, others[len(others) - open_pairs :])):
                for other in others_of_it.tolist():
                    assert other % triangle.PARTS == part
                    for one, another in ((own, other), (other, own)):
                        tiles = made[one, another * ratio : (another + 1) * ratio]
                        assert (tiles == -1).all()
                        tiles[:] = relation
    torch.testing.assert_close(made, relations_by_tile(listed))
    return divided.rest


def relations_by_tile(listed: plan.Plan) -> torch.Tensor:
    """(blocks of rows, blocks of columns) of each tile its relation, 0 for mixed, −1 for one that is not listed."""
    relations = torch.full_like(listed.tiles, -1)
    for row, tiles, (bulk, same, mixed) in zip(relations, listed.tiles, listed.counts.tolist(), strict=True):
        for first, last in ((0, bulk + same), (len(tiles) - mixed, len(tiles))):
            assert (row[tiles[first:last] // 4] == -1).all()
            row[tiles[first:last] // 4] = tiles[first:last] % 4
    return relations


@pytest.mark.parametrize("grouped", [False, True])
def test_every_pair_is_made_once_for_each_of_its_rows(grouped):
    rest = check_cover(rows_of_blocks(grouped=grouped))
    assert rest.counts[:6, 0].sum() == 2 * grouped  # of the linked pair of blocks one tile each, of two, is uniform


@pytest.mark.slow
@pytest.mark.parametrize("mix", inputs.MIXES)
@pytest.mark.parametrize("rows", [32, 300])
def test_every_pair_of_a_mix_is_made_once_for_each_of_its_rows(rows, mix):
    batch = inputs.make_rows(mix, rows, 16, torch.float32, DEVICE)
    check_cover(inputs.replace(batch, group=torch.arange(rows, device=DEVICE).clamp(max=40) // 5 % 8))


def test_blocks_make_the_same_number_of_pairs():
    """Of unlabelled rows without twins all pairs of blocks are whole, and so no program waits for another."""
    rows = inputs.make_rows("unlabelled", 32 * 12, 16, torch.float32, DEVICE)
    rows = inputs.replace(rows, identity=torch.full_like(rows.identity, -1))
    side, listed, tile = planned(rows)
    pairs = triangle.divide(listed, side, tile).pair_counts.sum((1, 2))
    assert pairs.tolist() == [6] * 6 + [5] * 6


def test_a_pair_of_blocks_is_whole_only_if_all_of_its_tiles_are(monkeypatch):
    """Of four tiles the first and the last two repel, the second may be of one class."""
    key = tuning.architecture_of(DEVICE), "forward", 4
    monkeypatch.setitem(tuning.TILES, key, {1024: tuning.Tile(64, 16, 4, 1, triangle=True)})
    monkeypatch.setitem(tuning.TILES, (key[0], "triangle", 4), {1024: tuning.Tile(64, 16, 4, 1)})
    table = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)
    candidate_set = torch.tensor([0, 1, 2, 3]).repeat_interleave(torch.tensor([64, 16, 16, 32]))
    embeddings = normalize(torch.randn(128, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = inputs.Rows(*(value.to(DEVICE) for value in (embeddings, torch.arange(128) // 2, candidate_set, table)))
    torch.testing.assert_close(lse(rows), reference(rows), rtol=0, atol=1e-6)


# Sums


@pytest.mark.parametrize("dtype", ["bf16", "fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_log_sum_exps(dtype):
    rows = rows_of_blocks(dtype=DTYPES[dtype], width=48, grouped=True)
    torch.testing.assert_close(lse(rows), reference(rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize("switched_off", ["identity_weight", pytest.param("label_weight", marks=pytest.mark.slow)])
def test_log_sum_exps_of_one_relation_alone(switched_off):
    rows = inputs.replace(rows_of_blocks(), **{switched_off: 0.0})
    torch.testing.assert_close(lse(rows), reference(rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("mix", "rows"),
    [(mix, 1) for mix in inputs.MIXES]
    + [pytest.param(mix, rows, marks=pytest.mark.slow) for mix in inputs.MIXES for rows in (129, 513)],
)
def test_log_sum_exps_of_a_mix(mix, rows):
    batch = inputs.make_rows(mix, rows, 16, torch.bfloat16, DEVICE)
    torch.testing.assert_close(lse(batch), reference(batch), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_log_sum_exps_of_a_larger_batch(monkeypatch):
    """With as many programs as on a GPU, blocks of the usual size, and rows of two parts."""
    monkeypatch.undo()
    for size in (2, 4):
        key = tuning.architecture_of(DEVICE), "forward", size
        by_width = {width: tile._replace(triangle=width <= 256) for width, tile in tuning.TILES[key].items()}
        monkeypatch.setitem(tuning.TILES, key, by_width)
    batch = inputs.make_rows("realistic", 1100, 192, torch.bfloat16, DEVICE)
    batch = inputs.replace(batch, group=torch.arange(1100, device=DEVICE).clamp(max=40) // 5 % 8)
    torch.testing.assert_close(lse(batch), reference(batch), rtol=0, atol=3e-6)


def test_same_bits_whatever_was_in_the_memory(monkeypatch):
    first = plain_lse()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # what is not initialised is NaN then, or the largest integer
    try:
        second = lse(rows_of_blocks())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)


def test_wide_similarities_are_left_to_the_other_kernel(monkeypatch):
    rows = inputs.replace(rows_of_blocks(), temperature=0.01)
    got = lse(rows)
    key = tuning.architecture_of(DEVICE), "forward", 4
    monkeypatch.setitem(tuning.TILES, key, {1024: tuning.Tile(32, 16, 4, 1)})
    assert torch.equal(got, lse(rows))
    torch.testing.assert_close(got, reference(rows), rtol=1e-6, atol=1e-6)


def test_switches_of_the_kernel(monkeypatch):
    rows = rows_of_blocks()
    launch = tuning.launch_for(rows.embeddings, "triangle")
    key = tuning.architecture_of(DEVICE), "triangle", 4
    plain = plain_lse()
    monkeypatch.setitem(tuning.TILES, key, {1024: launch.tile._replace(descriptor=True)})
    assert torch.equal(lse(rows), plain)
    monkeypatch.setitem(tuning.TILES, key, {1024: launch.tile._replace(polynomial=4)})
    some_by_polynomial = lse(rows)
    assert not torch.equal(some_by_polynomial, plain)
    torch.testing.assert_close(some_by_polynomial, plain, rtol=0, atol=3e-7)


@pytest.mark.parametrize("key", [key for key in tuning.TILES if key[1] == "triangle"], ids=str)
def test_tiles_fit_those_of_the_rest(key):
    for width, tile in tuning.TILES[key].items():
        by_width = tuning.TILES[key[0], "forward", key[2]]
        of_rest = next(of_rest for widest, of_rest in by_width.items() if width <= widest)
        assert tile.rows == of_rest.rows and tile.rows % of_rest.columns == 0
        assert tile.rows % tile.columns == 0 and not tile.step


# Exponentials


@triton.jit
def exp2_kernel(x, result, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POLYNOMIAL: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(result + place, triangle.exp2_shared(tl.load(x + place), POLYNOMIAL))


def exp2(x: torch.Tensor, polynomial: int) -> torch.Tensor:
    result = torch.empty_like(x)
    exp2_kernel[(1,)](x, result, *x.shape, POLYNOMIAL=polynomial)
    return result


def exponents() -> torch.Tensor:
    """(256, 256) from −87 to 87, more than narrow similarities reach, with all the halves and whole numbers."""
    x = torch.linspace(-87, 87, 256 * 256, device=DEVICE)
    x[: 4 * 87 + 1] = torch.arange(-87, 87.5, 0.5)
    return x.view(256, 256)


def relative_error(got: torch.Tensor, x: torch.Tensor) -> float:
    return float((got / x.double().exp2() - 1).abs().max())


def test_the_polynomial_is_as_good_as_float32_allows():
    x = exponents()
    assert relative_error(exp2(x, 1), x) < 1.7e-7
    assert (exp2(x, 1)[x == x.round()] == x[x == x.round()].exp2()).all()


@pytest.mark.parametrize("polynomial", [0, 2, 4, 8])
def test_of_the_columns_one_in_so_many_is_a_polynomial_and_none_has_moved(polynomial):
    x = exponents()
    got, pure = exp2(x, polynomial), exp2(x, 1)
    assert relative_error(got, x) < 2.5e-7
    is_polynomial = (got == pure).all(0)
    assert is_polynomial.sum() == (256 // polynomial if polynomial else 0)
