"""Logistic regression of voxel features, of which only some classes are known in each scan."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mixcl_dist.linear import PENALTY, VOXELS_OF_CLASS, Voxels, fit, of_levels, sample


def voxels(known=(False, True, True), count=3000) -> Voxels:
    """Three clouds of points; a class that is not known is labelled as background."""
    random = torch.Generator().manual_seed(0)
    of_class = torch.randint(3, (count,), generator=random)
    centres = torch.tensor([[0.0, 0.0, 0.0], [40.0, 0.0, 1.0], [0.0, 0.3, -2.0]])
    spread = torch.tensor([10.0, 0.1, 0.5])
    features = centres[of_class] + spread * torch.randn(count, 3, generator=random)
    drawn = torch.where(torch.tensor(known)[of_class], of_class, 0)
    whole = torch.ones(count)
    return Voxels(features, drawn, whole, torch.zeros(count, dtype=torch.int64), torch.tensor(known).expand(count, -1))


def accuracy(found: Voxels, weight, bias, truth) -> float:
    return float(((found.features @ weight.T + bias).argmax(1) == truth).float().mean())


def test_classes_are_told_apart_by_features_of_any_scale():
    points = voxels()
    weight, bias = fit(points)
    assert accuracy(points, weight, bias, points.label) > 0.85


def test_it_is_the_minimum_of_the_penalised_likelihood():
    points = voxels()
    weight, bias = fit(points)
    mean, scale = points.features.mean(0), points.features.std(0)
    standard = (points.features - mean) / scale
    share = points.importance / points.importance.sum()

    def loss(of_standard, constant):
        surprise = F.cross_entropy(standard @ of_standard.T + constant, points.label, reduction="none")
        return float((share * surprise).sum() + PENALTY * of_standard.square().sum())

    best = weight * scale, bias + weight @ mean
    for seed in range(10):
        step = [0.02 * torch.randn(part.shape, generator=torch.Generator().manual_seed(seed)) for part in best]
        assert loss(*best) < loss(*(part + change for part, change in zip(best, step, strict=True)))


def test_what_is_called_background_may_be_of_a_class_that_is_not_known_there():
    """One scan of ten knows the second class: the others' points of it must not teach that it is background."""
    whole, part = voxels(), voxels(known=(False, True, False))
    points = Voxels.joined([whole, *[part] * 9])
    truth = whole.label.repeat(10)
    weight, bias = fit(points)
    assert accuracy(points, weight, bias, truth) > 0.85
    misled = dataclasses.replace(points, known=torch.tensor([False, True, True]).expand(len(truth), -1))
    assert accuracy(points, weight, bias, truth) > accuracy(points, *fit(misled), truth) + 0.05


def test_sampled_voxels_stand_for_all_of_their_patch():
    label = np.zeros((1, 8, 8, 8), np.uint8)
    label[0, :, :, :4] = 1
    label[0, 0, 0] = 255
    finest, coarse = torch.arange(512.0).view(1, 1, 8, 8, 8), torch.zeros(1, 2, 4, 4, 4)
    found = sample([coarse, finest], label, np.array([[False, True]]), first=7)
    assert found.features.shape == (len(found.label), 3) and set(found.patch.tolist()) == {7}
    assert (found.label == 1).sum() == VOXELS_OF_CLASS
    flat = torch.from_numpy(label.ravel().astype(np.int64))
    assert torch.equal(flat[found.features[:, 0].long()], found.label), "features are of the voxel that is labelled"
    for number in (0, 1):
        stood_for = found.weight[found.label == number].sum()
        assert stood_for == pytest.approx(int((flat == number).sum()))


def test_nothing_is_sampled_of_a_patch_that_is_ignored():
    label = np.full((2, 4, 4, 4), 255, np.uint8)
    label[1, 0, 0, 0] = 0
    found = sample([torch.zeros(2, 3, 4, 4, 4)], label, np.zeros((2, 2), bool), first=0)
    assert found.patch.tolist() == [1] and found.weight.tolist() == [1.0]


def test_weights_of_the_levels_are_in_the_order_of_the_pyramid():
    pyramid = [torch.zeros(1, width, 1, 1, 1) for width in (5, 3, 2)]
    weight = torch.arange(10.0).expand(2, 10)
    assert [part[0].tolist() for part in of_levels(weight, pyramid)] == [[2, 3, 4, 5, 6], [7, 8, 9], [0, 1]]
