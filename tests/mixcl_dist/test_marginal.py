"""The loss of partly annotated cases."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceLoss

from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.marginal import FOREGROUND_WEIGHT, marginal_loss

CLASSES = 3


@pytest.fixture
def scene():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES + 1, 6, 6, 6, generator=generator)
    target = torch.randint(0, CLASSES + 1, (2, 1, 6, 6, 6), generator=generator)
    return logits.requires_grad_(), target


def known(*rows):
    return torch.tensor([[0, *row] for row in rows], dtype=torch.bool)


def dice_and_cross_entropy(logits, target):
    """Of complete labels that show every class: mean over cases of MONAI's Dice loss plus weighted log-likelihood."""
    weight = torch.where(target > 0, FOREGROUND_WEIGHT, 1.0)
    surprise = -logits.log_softmax(dim=1).gather(1, target)
    cross_entropy = (weight * surprise).sum(dim=(1, 2, 3, 4)) / weight.sum(dim=(1, 2, 3, 4))
    return DiceLoss(include_background=False, to_onehot_y=True, softmax=True)(logits, target) + cross_entropy.mean()


def test_with_all_classes_annotated_it_is_dice_and_cross_entropy(scene):
    logits, target = scene
    plain = dice_and_cross_entropy(logits, target)
    torch.testing.assert_close(marginal_loss(logits, target, known([1, 1, 1], [1, 1, 1])), plain)


def test_one_known_class_is_a_two_class_problem(scene):
    logits, target = scene
    only_second = torch.where(target == 2, 2, 0)
    others = torch.logsumexp(logits[:, [0, 1, 3]], dim=1)
    binary = torch.stack([others, logits[:, 2]], dim=1)
    plain = dice_and_cross_entropy(binary, (only_second > 0).long())
    torch.testing.assert_close(marginal_loss(logits, only_second, known([0, 1, 0], [0, 1, 0])), plain)


def test_how_background_and_unknown_classes_share_their_probability_is_left_open(scene):
    """Moving probability between them along their softmax's level set changes nothing: that slope is zero."""
    logits, target = scene
    loss = marginal_loss(logits, torch.where(target == 2, 2, 0), known([0, 1, 0], [0, 1, 0]))
    (gradient,) = torch.autograd.grad(loss, logits)
    merged = [0, 1, 3]
    share = logits[:, merged].softmax(dim=1)
    total = gradient[:, merged].sum(dim=1, keepdim=True)
    torch.testing.assert_close(gradient[:, merged], share * total)


def test_each_case_counts_with_its_own_classes(scene):
    logits, target = scene
    target = torch.stack([torch.where(target[0] == 1, 1, 0), torch.where(target[1] == 3, 3, 0)])
    together = marginal_loss(logits, target, known([1, 0, 0], [0, 0, 1]))
    first = marginal_loss(logits[:1], target[:1], known([1, 0, 0]))
    second = marginal_loss(logits[1:], target[1:], known([0, 0, 1]))
    torch.testing.assert_close(together, (first + second) / 2)


def test_dice_counts_the_classes_that_are_there(scene):
    """Without class 3 in the crop, Dice is the mean over classes 1 and 2; cross-entropy still knows class 3."""
    logits, target = scene
    target = torch.where(target == 3, 0, target)
    weight = torch.where(target > 0, FOREGROUND_WEIGHT, 1.0)
    surprise = -logits.log_softmax(dim=1).gather(1, target)
    cross_entropy = (weight * surprise).sum(dim=(1, 2, 3, 4)) / weight.sum(dim=(1, 2, 3, 4))
    each = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, reduction="none")(logits, target)
    expected = each.flatten(1)[:, :2].mean() + cross_entropy.mean()
    torch.testing.assert_close(marginal_loss(logits, target, known([1, 1, 1], [1, 1, 1])), expected)


def test_a_crop_without_foreground_still_teaches_background(scene):
    logits, target = scene
    loss = marginal_loss(logits, torch.zeros_like(target), known([1, 1, 1], [1, 1, 1]))
    torch.testing.assert_close(loss, -logits.log_softmax(dim=1)[:, 0].mean())


def test_ignored_voxels_teach_nothing(scene):
    """Independent truth: the loss of a volume that does not have them."""
    logits, target = scene
    masked = target.clone()
    masked[:, :, :2] = IGNORED
    loss = marginal_loss(logits, masked, known([1, 1, 1], [1, 0, 1]))
    expected = marginal_loss(logits[:, :, 2:], target[:, :, 2:], known([1, 1, 1], [1, 0, 1]))
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[:, :, :2].any() and gradient[:, :, 2:].any()


def test_a_crop_that_is_ignored_whole_teaches_nothing(scene):
    logits, target = scene
    loss = marginal_loss(logits, torch.full_like(target, IGNORED), known([1, 1, 1], [1, 1, 1]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and not gradient.any()
