"""Training crops of labelled volumes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from mixcl_dist.crops import Crops, LabelledVolume

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
