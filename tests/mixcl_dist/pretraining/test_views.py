"""Two views of a patch: where they lie, what they show, and how they are degraded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from mixcl_dist.intensity import normalise
from mixcl_dist.pretraining.draws import Draws
from mixcl_dist.pretraining.views import MASKED_VALUE, Views, _smoothing, make_views
from mixcl_dist.settings import ViewsConfig

WINDOW = (-1000.0, 1000.0)
SPACING = (0.8, 1.0, 2.5)
CLEAN = {"mask_fraction": 0.0, "noise_hu": 0.0, "blur_sigma": 0.0, "low_resolution": 1.0, "shift_hu": 0.0}
STILL = {"rotation_deg": 0.0, "scale": (1.0, 1.0)}


def views_of(image: torch.Tensor, config: ViewsConfig, seed: int = 0) -> Views:
    spacing = torch.tensor(SPACING).repeat(len(image), 1)
    return make_views(image, spacing, config, WINDOW, Draws(seed, range(len(image))))


def random_patches(count: int = 2, size: tuple[int, ...] = (20, 24, 18), seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1000, 1000, (count, 1, *size), generator=generator).to(torch.int16)


def origins(views: Views) -> torch.Tensor:
    return views.patch_from_view[:, :3, 3]


def test_equal_draws_make_equal_views():
    config = ViewsConfig(size=(16, 16, 16))
    first, again, other = (views_of(random_patches(), config, seed) for seed in (1, 1, 2))
    for a, b in zip(vars(first).values(), vars(again).values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.image, other.image)


def test_views_of_a_patch_do_not_depend_on_the_patches_beside_it():
    """So a run makes the same views on any number of ranks and accumulation steps."""
    patches, spacing = random_patches(4), torch.tensor(SPACING).repeat(4, 1)
    config = ViewsConfig(size=(16, 16, 16))
    whole = make_views(patches, spacing, config, WINDOW, Draws(5, [10, 11, 12, 13]))
    half = make_views(patches[2:], spacing[2:], config, WINDOW, Draws(5, [12, 13]))
    for one, part in zip(vars(whole).values(), vars(half).values(), strict=True):
        torch.testing.assert_close(one[[2, 3, 6, 7]], part)


def test_without_turn_and_scale_a_view_is_a_box_of_the_patch():
    size = (12, 16, 8)
    patches = random_patches(3)
    views = views_of(patches, ViewsConfig(size=size, **STILL, **CLEAN))
    for view in range(6):
        x, y, z = (int(corner) for corner in origins(views)[view])
        box = patches[view % 3, :, x : x + 12, y : y + 16, z : z + 8]
        torch.testing.assert_close(views.clean[view], normalise(box, WINDOW), atol=1e-4, rtol=0)
    assert len({tuple(origin.tolist()) for origin in origins(views)}) > 1


def test_views_show_what_the_mapping_says():
    """Independent truth: linear interpolation by scipy at the mapped positions, border voxels repeated."""
    patches = random_patches()
    views = views_of(patches, ViewsConfig(size=(16, 20, 16), rotation_deg=40.0, scale=(0.7, 1.3), **CLEAN))
    index = np.stack([*np.indices((16, 20, 16)), np.ones((16, 20, 16))]).reshape(4, -1)
    for view in range(4):
        position = (views.patch_from_view[view].double().numpy() @ index)[:3]
        patch = patches[view % 2, 0].double().numpy()
        expected = ndimage.map_coordinates(patch, position, order=1, mode="nearest").reshape(16, 20, 16)
        np.testing.assert_allclose(views.clean[view, 0], expected / 1000, atol=2e-3)


def test_turns_are_rigid_in_mm_and_never_mirror():
    views = views_of(
        random_patches(200, (8, 8, 8)),
        ViewsConfig(size=(8, 8, 8), rotation_deg=30.0, scale=(0.8, 1.25), mask_block=4),
    )
    spacing = torch.tensor(SPACING)
    in_mm = views.patch_from_view[:, :3, :3] * spacing[:, None] / spacing
    scale = torch.linalg.det(in_mm) ** (1 / 3)
    turn = in_mm / scale[:, None, None]
    torch.testing.assert_close(turn @ turn.mT, torch.eye(3).expand(400, 3, 3), atol=1e-5, rtol=0)
    angle = torch.rad2deg(torch.acos((turn.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2))
    assert angle.max() <= 30.1 and angle.max() > 25
    assert scale.min() >= 0.799 and scale.max() <= 1.251 and scale.max() - scale.min() > 0.4


@pytest.mark.parametrize("min_overlap", [0.0, 0.3, 0.6, 1.0])
def test_views_overlap_at_least_as_asked_and_stay_inside(min_overlap):
    size, patch = (8, 10, 6), (16, 18, 16)
    config = ViewsConfig(size=size, min_overlap=min_overlap, mask_block=2, **STILL)
    views = views_of(random_patches(300, patch), config)
    assert (origins(views) >= 0).all()
    assert (origins(views) + torch.tensor(size) <= torch.tensor(patch)).all()
    first, second = origins(views).chunk(2)
    shared = (1 - (first - second).abs() / torch.tensor(size)).clamp(min=0).prod(dim=1)
    assert shared.min() >= min_overlap - 1e-5
    assert shared.min() < min_overlap + 0.2, "the permitted range is used"


def test_scaled_views_stay_inside_where_they_fit():
    size, patch = (16, 16, 16), (24, 24, 24)
    views = views_of(random_patches(100, patch), ViewsConfig(size=size, rotation_deg=0.0, scale=(0.8, 1.4)))
    corners = torch.tensor([[0.0, 0, 0, 1], [15.0, 15, 15, 1]])
    position = (views.patch_from_view @ corners.T)[:, :3]
    assert position.min() >= -1e-4 and position.max() <= 23 + 1e-4


def test_a_view_larger_than_the_patch_is_refused():
    with pytest.raises(ValueError, match=r"views.size \(32, 32, 32\) exceeds the patch size \(20, 24, 18\)"):
        views_of(random_patches(), ViewsConfig())


def test_without_degradation_the_image_is_the_clean_view():
    views = views_of(random_patches(), ViewsConfig(size=(16, 16, 16), **CLEAN))
    torch.testing.assert_close(views.image, views.clean, atol=1e-5, rtol=0)
    assert not views.mask.any()


def test_degraded_views_differ_from_clean_ones_and_stay_in_range():
    views = views_of(random_patches(), ViewsConfig(size=(16, 16, 16)))
    assert views.image.dtype == views.clean.dtype == torch.float32
    assert views.image.abs().max() <= 1 and views.clean.abs().max() <= 1
    assert (views.image - views.clean)[~views.mask].abs().mean() > 0.05


def test_every_view_loses_the_asked_share_of_whole_blocks():
    views = views_of(random_patches(3), ViewsConfig(size=(16, 16, 16), mask_fraction=0.25, mask_block=4))
    assert (views.image[views.mask] == MASKED_VALUE).all()
    blocks = views.mask.float().unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).flatten(5)
    assert ((blocks.sum(-1) == 0) | (blocks.sum(-1) == 64)).all()
    assert (views.mask.flatten(1).float().mean(1) == 0.25).all()
    assert not torch.equal(views.mask[0], views.mask[1])


def test_mask_blocks_that_do_not_divide_the_view_are_cut():
    views = views_of(random_patches(), ViewsConfig(size=(10, 12, 9), mask_fraction=1.0, mask_block=8))
    assert views.mask.shape == (4, 1, 10, 12, 9) and views.mask.all()


def test_a_shift_moves_a_whole_view_by_at_most_its_limit():
    views = views_of(
        torch.zeros(50, 1, 8, 8, 8, dtype=torch.int16),
        ViewsConfig(size=(8, 8, 8), **{**CLEAN, "shift_hu": 100.0}),
    )
    shift = (views.image - views.clean).flatten(1)
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift))
    assert shift.abs().max() <= 0.1 + 1e-6 and shift.max() > 0.05 and shift.min() < -0.05


def test_noise_is_in_hu_and_of_different_strength_in_each_view():
    views = views_of(
        torch.zeros(50, 1, 16, 16, 16, dtype=torch.int16),
        ViewsConfig(size=(16, 16, 16), **{**CLEAN, "noise_hu": 100.0}),
    )
    deviation = views.image.flatten(1).std(dim=1)
    assert deviation.max() < 0.105 and deviation.max() > 0.08 and deviation.min() < 0.02


def test_blur_is_a_gaussian():
    """Independent truth: scipy's filter, away from the ends, where the two treat the missing voxels differently."""
    signal = np.random.default_rng(0).normal(size=64)
    (kernel,) = _smoothing(64, torch.tensor([1.7]), torch.tensor([1.0])).double().numpy()
    expected = ndimage.gaussian_filter1d(signal, 1.7, truncate=8)
    np.testing.assert_allclose((kernel @ signal)[16:-16], expected[16:-16], atol=1e-5)


def test_low_resolution_keeps_a_ramp_and_loses_detail():
    (kernel,) = _smoothing(30, torch.tensor([0.0]), torch.tensor([2.5]))
    ramp = torch.arange(30.0)
    torch.testing.assert_close((kernel @ ramp)[:25], ramp[:25], atol=1e-4, rtol=0)
    # every voxel is now made of what was kept at 0, 2.5, 5, …: voxel 1 is seen no more
    assert (kernel[:, 1] == 0).all() and (kernel[:, 5] > 0).any()


def test_no_blur_at_full_resolution_changes_nothing_and_rows_always_sum_to_one():
    assert torch.equal(_smoothing(9, torch.zeros(1), torch.ones(1))[0], torch.eye(9))
    kernel = _smoothing(9, torch.rand(20) * 3, 1 + torch.rand(20) * 4)
    torch.testing.assert_close(kernel.sum(2), torch.ones(20, 9))
