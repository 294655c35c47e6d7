"""Training crops of labelled volumes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.finetuning import crops as module
from mixcl_dist.finetuning.crops import (
    GAIN,
    GAIN_SHARE,
    NOISE_HU,
    NOISE_SHARE,
    ROTATION,
    SCALE,
    SHIFT_HU,
    SHIFT_SHARE,
    Crops,
    LabelledVolume,
    augment,
    draw_intensity,
    draw_linear,
    sampling_matrix,
)

SIZE = (16, 16, 16)
WINDOW_HU = (-1000.0, 1000.0)
KNOWN = np.array([False, True, True])


def volume(shape=(40, 36, 30)):
    """A large organ 1 of 300 HU, and a small organ 2 of 600 HU on the low-x side."""
    hu = np.full(shape, -200, dtype=np.int16)
    target = np.zeros(shape, dtype=np.uint8)
    target[20:38, 8:30, 5:25] = 1
    target[4:7, 10:13, 10:13] = 2
    hu[target == 1], hu[target == 2] = 300, 600
    return LabelledVolume(hu, target, KNOWN)


def test_image_and_target_stay_together():
    crops = Crops([volume()], SIZE, WINDOW_HU, seed=0)
    for _ in range(10):
        batch = crops.batch(2)
        assert batch.image.shape == batch.target.shape == (2, 1, *SIZE)
        assert batch.image.dtype == torch.float32 and batch.image.abs().max() <= 1
        means = [batch.image[batch.target == k].mean() for k in (0, 1, 2) if (batch.target == k).sum() > 30]
        assert all(low < high for low, high in pairwise(means))


def test_a_small_organ_is_seen_as_often_as_a_large_one():
    crops = Crops([volume()], SIZE, WINDOW_HU, seed=0)
    seen = sum((crops.batch(1).target == 2).any().item() for _ in range(60))
    assert seen > 10  # a sixth of its share by volume would be one or two


def test_left_and_right_are_never_exchanged():
    crops = Crops([volume()], (40, 32, 24), WINDOW_HU, seed=0)
    for _ in range(20):
        target = crops.batch(1).target[0, 0]
        if (target == 1).sum() > 50 and (target == 2).sum() > 5:
            assert (target == 2).nonzero()[:, 0].float().mean() < (target == 1).nonzero()[:, 0].float().mean()


def test_a_volume_smaller_than_a_crop_is_surrounded_by_air():
    crops = Crops([volume((40, 36, 10))], (16, 16, 32), WINDOW_HU, seed=0)
    batch = crops.batch(2)
    assert batch.image.shape == (2, 1, 16, 16, 32)
    assert batch.image.min() < -0.8


def test_one_seed_gives_the_same_crops():
    first, second, other = (Crops([volume()], SIZE, WINDOW_HU, seed) for seed in (4, 4, 5))
    image = first.batch(2).image
    torch.testing.assert_close(image, second.batch(2).image, rtol=0, atol=0)
    assert not torch.equal(image, other.batch(2).image)


def test_crops_are_turned_and_scaled_about_their_middle():
    """Independent truth: SciPy's affine transform of the same voxels."""
    rng = np.random.default_rng(0)
    cut_size, size = (22, 20, 26), (18, 16, 20)
    image = ndimage.gaussian_filter(rng.uniform(-1, 1, (3, *cut_size)), (0, 1, 1, 1)).astype(np.float32)
    target = ndimage.zoom(rng.choice([0, 1, 2, IGNORED], (3, 11, 10, 13)), (1, 2, 2, 2), order=0).astype(np.uint8)
    linear = draw_linear(rng, 3)
    unchanged = np.tile([1, 0, 0], (3, 1))
    parameters = np.hstack([sampling_matrix(linear, cut_size, size).reshape(3, 12), unchanged])
    batch = [torch.from_numpy(array)[:, None] for array in (image, target)]
    turned, nearest = augment(*batch, torch.from_numpy(parameters).float(), torch.randn(3, 1, *size))
    for number, each in enumerate(linear):
        offset = (np.array(cut_size) - 1) / 2 - each @ ((np.array(size) - 1) / 2)
        place = {"offset": offset, "output_shape": size, "mode": "nearest"}
        expected = ndimage.affine_transform(image[number], each, order=1, **place)
        np.testing.assert_allclose(turned[number, 0], expected, atol=2e-6)
        expected = ndimage.affine_transform(target[number], each, order=0, **place)
        assert (nearest[number, 0].numpy() == expected).mean() > 0.999  # resolution of float32 half way between voxels


def test_turns_and_scales_are_uniform_about_every_axis():
    linear = draw_linear(np.random.default_rng(0), 2000)
    scale = np.linalg.norm(linear, axis=1)
    turn = Rotation.from_matrix(linear / scale[:, None])  # refuses mirrored ones
    for value, middle, reach in ((scale, 1, SCALE), (turn.as_euler("XYZ"), 0, ROTATION)):
        assert np.abs(value - middle).max() < reach + 1e-9
        np.testing.assert_allclose(value.mean(axis=0), middle, atol=reach / 15)
        np.testing.assert_allclose(value.std(axis=0), reach / np.sqrt(3), rtol=0.05)


def test_every_second_crop_is_scaled_or_shifted_and_every_third_noisy():
    per_hu = 1e-3
    drawn = draw_intensity(np.random.default_rng(0), 4000, per_hu) - (1, 0, 0)
    np.testing.assert_allclose((drawn != 0).mean(axis=0), (GAIN_SHARE, SHIFT_SHARE, NOISE_SHARE), atol=0.03)
    reach = np.array((GAIN, SHIFT_HU * per_hu, NOISE_HU * per_hu))
    np.testing.assert_allclose(drawn.max(axis=0), reach, rtol=0.01)
    np.testing.assert_allclose(drawn.min(axis=0), (-reach[0], -reach[1], 0), rtol=0.01)


def test_intensities_are_scaled_then_shifted_then_noisy_within_the_range():
    image, noise = torch.rand(2, 1, 8, 8, 8) * 2 - 1, torch.randn(2, 1, 8, 8, 8)
    matrix = sampling_matrix(np.eye(3)[None].repeat(2, axis=0), (8, 8, 8), (8, 8, 8)).reshape(2, 12)
    intensity = np.array([[1.1, -0.02, 0.3], [1, 0, 0]])
    parameters = torch.from_numpy(np.hstack([matrix, intensity])).float()
    changed, _ = augment(image, torch.zeros_like(image), parameters, noise)
    torch.testing.assert_close(changed[0], (image[0] * 1.1 - 0.02 + 0.3 * noise[0]).clamp(-1, 1))
    torch.testing.assert_close(changed[1], image[1])


def test_targets_hold_what_the_volume_holds():
    ignored = volume()
    ignored.target[:20] = IGNORED
    values = torch.cat([Crops([ignored], SIZE, WINDOW_HU, seed).batch(4).target for seed in range(5)]).unique()
    assert values.tolist() == [0, 1, IGNORED]


@pytest.mark.parametrize("resident_bytes", [module.RESIDENT_BYTES, 0])
def test_a_batch_is_made_on_the_gpu_without_waiting(imagined_gpu, monkeypatch, resident_bytes):
    monkeypatch.setattr(module, "RESIDENT_BYTES", resident_bytes)
    monkeypatch.setattr(torch, "Generator", lambda device, cpu=torch.Generator: cpu())  # there is no GPU to draw on
    monkeypatch.setattr(Crops, "_parameters", lambda self, count: torch.empty(count, 15, device=self._device))
    crops = Crops([volume(), volume((12, 40, 30))], SIZE, WINDOW_HU, 0, imagined_gpu)
    assert {volume.device.type for volume in crops._hu} == {"cuda" if resident_bytes else "cpu"}
    batch = crops.batch(3)
    assert {tensor.device for tensor in (batch.image, batch.target, batch.known)} == {imagined_gpu}
    assert batch.image.shape == batch.target.shape == (3, 1, *SIZE)
