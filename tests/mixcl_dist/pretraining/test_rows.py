"""Which voxels become rows: the same places in both views, spread, near borders, with honest candidate sets."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mixcl_dist.data_shards.catalogue import IGNORED, Catalogue
from mixcl_dist.pretraining.draws import Draws
from mixcl_dist.pretraining.rows import Rows, sample_rows
from mixcl_dist.pretraining.views import make_views
from mixcl_dist.settings import RowsConfig, ViewsConfig

PATCH, SIZE = (32, 28, 24), (20, 20, 16)
LIVER, SPLEEN = 1, 2
ALL = 0b1111
# classes liver, spleen and the two of "neither": both annotated, only the liver annotated, nothing annotated
BOTH, ONLY_LIVER, NONE = [0b1100, 0b0001, 0b0010, ALL], [0b1110, 0b0001, ALL, ALL], [ALL] * 4


def shifted_views(*origins: tuple[tuple[int, int, int], tuple[int, int, int]]) -> torch.Tensor:
    """The mapping of views that are boxes, given as the corners of the two views of each patch."""
    matrix = torch.eye(4).repeat(2 * len(origins), 1, 1)
    matrix[:, :3, 3] = torch.tensor([pair[i] for i in (0, 1) for pair in origins])
    return matrix


def turned_views(patches: int, seed: int = 0) -> torch.Tensor:
    config = ViewsConfig(size=SIZE, rotation_deg=25.0, scale=(0.8, 1.25))
    image = torch.zeros(patches, 1, *PATCH, dtype=torch.int16)
    spacing = torch.tensor([0.8, 1.0, 2.5]).repeat(patches, 1)
    return make_views(image, spacing, config, (-1000, 1000), Draws(seed, range(patches))).patch_from_view


def organs(patches: int = 1) -> torch.Tensor:
    """A large liver and a small spleen that touch, in background."""
    label = torch.zeros(patches, *PATCH, dtype=torch.uint8)
    label[:, 6:26, 6:16, 4:20] = LIVER
    label[:, 10:18, 16:24, 6:14] = SPLEEN
    return label


def all_rows_of(matrix, label, bits, seed=0, **config) -> Rows:
    bits = torch.tensor(bits)[:, None].expand(len(label), -1, -1)
    return sample_rows(matrix, SIZE, label, bits, RowsConfig(**config), Draws(seed, range(len(label))))


def only_present(rows: Rows) -> Rows:
    of_rows = {name: getattr(rows, name)[rows.present] for name in ("voxel_index", "identity", "candidate_set")}
    return dataclasses.replace(rows, **of_rows, present=rows.present[rows.present])


def rows_of(*arguments, **config) -> Rows:
    return only_present(all_rows_of(*arguments, **config))


def patch_position(matrix: torch.Tensor, rows: Rows) -> torch.Tensor:
    """(R, 3) continuous patch index of each row's voxel."""
    voxel = torch.cat([rows.voxel_index[:, 1:], torch.ones_like(rows.identity)[:, None]], dim=1).double()
    return (matrix.double()[rows.voxel_index[:, 0]] @ voxel[..., None])[:, :3, 0]


def mask_of_sets(rows: Rows) -> torch.Tensor:
    return (rows.set_table.long() << torch.arange(rows.set_table.shape[1])).sum(1)[rows.candidate_set]


def test_twins_of_shifted_views_are_the_same_voxel_of_the_patch():
    matrix = shifted_views(((0, 0, 0), (5, 3, 2)), ((8, 8, 4), (12, 2, 8)))
    rows = rows_of(matrix, organs(2), BOTH)
    first, second = patch_position(matrix, rows).chunk(2)
    assert len(first) > 100 and torch.equal(first, second)
    assert rows.identity.unique(return_counts=True)[1].tolist() == [2] * len(first)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_twins_of_turned_anisotropic_views_show_the_same_place(axis):
    """Patches hold their own coordinate: what twins show differs by the rounding to each view's voxels at most."""
    spacing = torch.tensor([0.8, 1.0, 2.5])
    config = ViewsConfig(size=SIZE, rotation_deg=25.0, scale=(0.8, 1.25))
    ramp_hu = (torch.arange(PATCH[axis]) * 10).view([-1 if a == axis else 1 for a in range(3)])
    image = ramp_hu.expand(4, 1, *PATCH).to(torch.int16)
    views = make_views(image, spacing.repeat(4, 1), config, (-1000, 1000), Draws(3, range(4)))
    rows = rows_of(views.patch_from_view, organs(4), BOTH)
    view, x, y, z = rows.voxel_index.unbind(1)
    first, second = (views.clean[view, 0, x, y, z] * 100).chunk(2)
    half_voxel = views.patch_from_view[view, axis, :3].abs().sum(1) / 2
    assert ((first - second).abs() <= half_voxel.view(2, -1).sum(0) + 1e-3).all()
    assert first.std() > 2.0


def test_rows_lie_in_the_two_views_of_their_patch_and_are_never_drawn_twice():
    matrix = turned_views(5)
    rows = rows_of(matrix, organs(5), BOTH)
    first, second = rows.voxel_index.chunk(2)
    assert torch.equal(first[:, 0] + 5, second[:, 0]) and set(first[:, 0].tolist()) == set(range(5))
    assert (rows.voxel_index[:, 1:] >= 0).all() and (rows.voxel_index[:, 1:] < torch.tensor(SIZE)).all()
    assert len(rows.voxel_index.unique(dim=0)) == len(rows.voxel_index)


@pytest.mark.parametrize("min_spacing", [1, 2, 3])
def test_points_keep_their_distance(min_spacing):
    matrix = shifted_views(((0, 0, 0), (0, 0, 0)))
    rows = rows_of(matrix, organs(), BOTH, min_spacing=min_spacing, per_view_pair=10_000)
    point = rows.voxel_index[: len(rows.identity) // 2, 1:]
    assert torch.pdist(point.float(), p=torch.inf).min() == min_spacing
    assert len(point) > 0.6 * 20 * 20 * 16 / (2 * min_spacing - 1) ** 3


def test_candidate_sets_follow_the_nearest_labels_of_both_twins():
    """Independent truth: the definition, row by row."""
    matrix, label = turned_views(3), organs(3)
    bits = torch.tensor([BOTH, ONLY_LIVER, NONE])
    rows = only_present(sample_rows(matrix, SIZE, label, bits[..., None], RowsConfig(), Draws(0, range(3))))
    points = len(rows.identity) // 2
    seen = []
    for (view, *_), position in zip(rows.voxel_index.tolist(), patch_position(matrix, rows), strict=True):
        x, y, z = (min(max(round(p), 0), edge - 1) for p, edge in zip(position.tolist(), PATCH, strict=True))
        seen.append(int(bits[view % 3, int(label[view % 3, x, y, z])]))
    expected = [seen[i % points] | seen[i % points + points] for i in range(2 * points)]
    assert mask_of_sets(rows).tolist() == expected
    assert any(seen[i] != seen[i + points] for i in range(points)), "some twins must disagree"


def test_a_class_that_was_not_annotated_stays_open():
    rows = rows_of(shifted_views(((0, 0, 0), (2, 2, 2))), organs(), ONLY_LIVER)
    assert set(mask_of_sets(rows).tolist()) == {0b0001, 0b1110, ALL}


def test_half_of_the_points_lie_near_borders_with_labels_in_balance():
    matrix, label = shifted_views(((4, 4, 4), (4, 4, 4))), organs()
    border = torch.zeros(PATCH, dtype=torch.bool)
    for x, y, z in torch.cartesian_prod(*(torch.arange(1, edge - 1) for edge in PATCH)).tolist():
        border[x, y, z] = len(label[0, x - 1 : x + 2, y - 1 : y + 2, z - 1 : z + 2].unique()) > 1
    near, all_labels = [], []
    for seed in range(40):
        rows = rows_of(matrix, label, BOTH, seed, per_view_pair=40)
        x, y, z = patch_position(matrix, rows)[:40].long().unbind(1)
        near.append(border[x, y, z].float().mean())
        all_labels.append(label[0, x, y, z][border[x, y, z]])
    share = torch.stack(near).mean()
    everywhere = border[4:24, 4:24, 4:20].float().mean()
    assert abs(share - (0.5 + 0.5 * everywhere)) < 0.1
    of_label = torch.cat(all_labels).bincount() / len(torch.cat(all_labels))
    assert of_label.min() > 0.21, "though the spleen's border is a fifth of the liver's"


def test_points_are_spread_evenly_where_there_are_no_labels():
    matrix = shifted_views(((0, 0, 0), (0, 0, 0)))
    label = torch.zeros(1, *PATCH, dtype=torch.uint8)
    half = torch.tensor(SIZE) / 2
    octant = torch.cat(
        [
            (
                (rows_of(matrix, label, NONE, seed, per_view_pair=64).voxel_index[:64, 1:] >= half).long()
                * torch.tensor([4, 2, 1])
            ).sum(1)
            for seed in range(20)
        ]
    ).bincount(minlength=8)
    assert octant.sum() == 20 * 64 and octant.min() > 100 and octant.max() < 220


def test_an_unlabelled_patch_may_be_anything():
    rows = rows_of(turned_views(2), torch.zeros(2, *PATCH, dtype=torch.uint8), NONE)
    assert rows.set_table.shape[1] == 4 and rows.set_table[rows.candidate_set].all()
    assert len(rows.candidate_set.unique()) == 1


def test_a_small_overlap_gives_fewer_rows():
    matrix = shifted_views(((0, 0, 0), (12, 8, 8)), ((0, 0, 0), (0, 0, 0)))
    rows = rows_of(matrix, organs(2), BOTH, per_view_pair=300)
    small, large = rows.voxel_index[: len(rows.identity) // 2, 0].bincount().tolist()
    assert 0 < small < 8 * 12 * 8 / 8 < large


def test_views_without_overlap_have_no_row_present():
    rows = all_rows_of(shifted_views(((0, 0, 0), (30, 30, 30))), organs(), BOTH, per_view_pair=50)
    assert len(rows.present) == 100 and not rows.present.any()


def test_there_are_as_many_rows_whatever_the_views_show_and_absent_ones_are_valid():
    for other_corner in ((0, 0, 0), (12, 8, 8), (19, 19, 15)):
        rows = all_rows_of(shifted_views(((0, 0, 0), other_corner)), organs(), BOTH, per_view_pair=300)
        assert len(rows.voxel_index) == len(rows.identity) == len(rows.candidate_set) == len(rows.present) == 600
        assert torch.equal(*rows.present.chunk(2)) and torch.equal(*rows.identity.chunk(2))
        assert (rows.voxel_index >= 0).all() and (rows.voxel_index < torch.tensor([2, *SIZE])).all()
        assert rows.candidate_set.max() < len(rows.set_table) and rows.set_table.any(dim=1).all()
    assert not rows.present.all()


def test_more_points_than_cells_are_one_for_each_cell():
    rows = all_rows_of(turned_views(1), organs(), BOTH, per_view_pair=10_000, min_spacing=3)
    cells = (32 // 5 + 2) * (28 // 5 + 2) * (24 // 5 + 2)
    assert len(rows.present) == 2 * cells


@pytest.mark.parametrize("border_fraction", [0.0, 1.0])
def test_all_points_or_none_are_drawn_near_borders(border_fraction):
    matrix, label = shifted_views(((4, 4, 4), (4, 4, 4))), torch.zeros(1, *PATCH, dtype=torch.uint8)
    label[:, 20:] = LIVER
    rows = rows_of(matrix, label, BOTH, border_fraction=border_fraction, per_view_pair=30)
    at_border = torch.isin(patch_position(matrix, rows)[:30, 0], torch.tensor([19.0, 20.0])).sum()
    assert at_border == 30 if border_fraction else at_border < 10


def test_rows_of_a_patch_do_not_depend_on_the_patches_beside_it():
    matrix, label, bits = turned_views(3), organs(3), torch.tensor([BOTH, ONLY_LIVER, NONE])[..., None]
    whole = sample_rows(matrix, SIZE, label, bits, RowsConfig(), Draws(0, [5, 6, 7]))
    alone = sample_rows(matrix[[2, 5]], SIZE, label[2:], bits[2:], RowsConfig(), Draws(0, [7]))
    of_patch = whole.voxel_index[:, 0] % 3 == 2
    assert torch.equal(whole.voxel_index[of_patch][:, 1:], alone.voxel_index[:, 1:])
    assert torch.equal(whole.present[of_patch], alone.present)
    assert torch.equal(whole.set_table[whole.candidate_set[of_patch]], alone.set_table[alone.candidate_set])


def test_sets_that_find_no_place_leave_their_rows_out(monkeypatch):
    matrix, label = turned_views(2), organs(2)
    every = all_rows_of(matrix, label, BOTH)
    monkeypatch.setattr("mixcl_dist.pretraining.rows.MAX_SETS", 2)
    some = all_rows_of(matrix, label, BOTH)
    kept = some.present
    assert 0 < kept.sum() < every.present.sum() and (every.present | ~kept).all()
    assert torch.equal(some.set_table[some.candidate_set][kept], every.set_table[every.candidate_set][kept])
    assert set(mask_of_sets(only_present(some)).tolist()) == set(sorted(set(mask_of_sets(every).tolist()))[:2])
    assert some.set_table.any(dim=1).all() and torch.equal(*kept.chunk(2))


def test_views_and_rows_are_made_on_a_gpu_without_waiting_for_it(request):
    """Fake tensors refuse what depends on contents, and operands of two devices."""
    draws = Draws(0, range(2))
    imagined_gpu = request.getfixturevalue("imagined_gpu")
    draws.device, draws._slot = imagined_gpu, draws._slot.to(imagined_gpu)
    image = torch.zeros(2, 1, *PATCH, dtype=torch.int16, device=imagined_gpu)
    spacing = torch.ones(2, 3, device=imagined_gpu)
    views = make_views(image, spacing, ViewsConfig(size=SIZE), (-1000, 1000), draws)
    bits = torch.zeros(2, 70, 2, dtype=torch.int64, device=imagined_gpu)
    rows = sample_rows(views.patch_from_view, SIZE, image[:, 0].byte(), bits, RowsConfig(), draws)
    made = [value for value in (vars(views) | vars(rows)).values() if value is not None]
    assert {value.device for value in made} == {imagined_gpu}
    assert rows.present.shape == (1024,) and views.image.shape == (4, 1, *SIZE)


@pytest.mark.parametrize("classes", [61, 117, 254])
def test_sets_of_many_classes_are_those_of_few(classes):
    """A liver and a spleen among many other organs: what is known of them is what it is without the others."""
    matrix, few = turned_views(3), organs(3)
    many = torch.where(few == SPLEEN, classes, few)
    names = tuple(f"organ {k}" for k in range(1, classes + 1))
    annotated = [("organ 1", f"organ {classes}"), ("organ 1",), None]
    bits = torch.stack([torch.from_numpy(Catalogue(names).candidate_bits(of_patch)) for of_patch in annotated])
    rows = sample_rows(matrix, SIZE, many, bits, RowsConfig(), Draws(0, range(3)))
    small = torch.tensor([BOTH, ONLY_LIVER, NONE])[..., None]
    expected = sample_rows(matrix, SIZE, few, small, RowsConfig(), Draws(0, range(3)))
    assert torch.equal(rows.voxel_index, expected.voxel_index) and torch.equal(rows.present, expected.present)
    found, told = rows.set_table[rows.candidate_set], expected.set_table[expected.candidate_set]
    assert torch.equal(found[:, [0, classes - 1, classes, classes + 1]], told)
    anything_else = ~(told.sum(1) <= told[:, :2].sum(1))  # not only liver, spleen or either
    assert torch.equal(found[:, 1 : classes - 1].all(1), anything_else)
    assert torch.equal(found[:, 1 : classes - 1].any(1), anything_else)
    assert len(rows.candidate_set.unique()) == len(expected.candidate_set.unique())


def test_views_that_hang_out_of_the_patch_give_rows_inside_it_only():
    label = torch.full((2, *PATCH), LIVER, dtype=torch.uint8)
    label[:, 1:-1, 1:-1, 1:-1] = SPLEEN
    matrix = shifted_views(((-6, -6, -6), (-6, -6, -6)), ((18, 14, 14), (18, 14, 14)))
    rows = rows_of(matrix, label, BOTH)
    position = patch_position(matrix, rows).long()
    assert (position >= 0).all() and (position < torch.tensor(PATCH)).all()
    outermost = ((position == 0) | (position == torch.tensor(PATCH) - 1)).any(dim=1)
    assert torch.equal(mask_of_sets(rows), torch.where(outermost, 0b0001, 0b0010))
    far = (position == torch.tensor(PATCH) - 1).any(dim=1)
    assert far.any() and (outermost & ~far).any()


def test_equal_draws_give_equal_rows():
    matrix, label = turned_views(2), organs(2)
    first, again, other = (all_rows_of(matrix, label, BOTH, seed).voxel_index for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_ignored_voxels_may_be_anything_and_are_no_border_to_draw_from():
    matrix, label = shifted_views(((4, 4, 4), (4, 4, 4))), organs()
    label[:, 4:, :6] = IGNORED
    drawn = [rows_of(matrix, label, BOTH, seed, per_view_pair=40) for seed in range(10)]
    ignored = 0
    for rows in drawn:
        x, y, z = patch_position(matrix, rows)[:40].long().unbind(1)
        hit = label[0, x, y, z] == IGNORED
        assert rows.set_table[rows.candidate_set[:40][hit]].all()
        ignored += int(hit[:20].sum())
    assert ignored == 0, "the first half lies near borders"
