"""The loss of partly annotated cases."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceLoss
from torch.nn import functional as F

from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.finetuning.marginal import FOREGROUND_WEIGHT, marginal_loss

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


def loss_of_a_case(logits, target, known):
    """The definition, voxel by voxel of what is judged: `logits` (K+1, N), `target` (N,), `known` (K+1,)."""
    judged = target != IGNORED
    logits, target = logits[:, judged], target[judged]
    if not target.numel():
        return 0 * logits.sum()
    merged = torch.cat([logits[~known].logsumexp(dim=0, keepdim=True), logits[known]])
    channel = torch.where(known, known.cumsum(0), 0)[target]
    weight = torch.full((len(merged),), FOREGROUND_WEIGHT, dtype=merged.dtype)
    weight[0] = 1
    cross_entropy = F.cross_entropy(merged[None], channel[None], weight=weight)
    present = torch.bincount(channel, minlength=len(merged))[1:] > 0
    if not present.any():
        return cross_entropy
    dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, reduction="none")
    return cross_entropy + dice(merged[None], channel[None, None]).flatten()[present].mean()


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("share_known", [0.0, 0.5, 1.0])
def test_a_batch_is_the_mean_of_its_cases_in_value_and_gradient(classes, share_known):
    """Random cases with ignored voxels and absent classes; one has nothing but background, one nothing judged."""
    generator = torch.Generator().manual_seed(classes)
    logits = 4 * torch.randn(5, classes + 1, 6, 5, 4, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    known = torch.rand(5, classes + 1, generator=generator) < share_known
    known[:, 0] = False
    target = torch.randint(0, classes + 1, (5, 1, 6, 5, 4), generator=generator)
    target[0][target[0] == 1] = 0
    target[1] = 0
    target = torch.where(known.gather(1, target.flatten(1)).view_as(target), target, 0)
    target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORED
    target[2] = IGNORED
    cases = zip(logits.flatten(2), target.flatten(1), known, strict=True)
    expected = torch.stack([loss_of_a_case(*case) for case in cases]).mean()
    loss = marginal_loss(logits, target, known)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_logits_far_apart_keep_finite_slopes(scene):
    _, target = scene
    logits = torch.zeros(2, CLASSES + 1, 6, 6, 6).index_fill(1, torch.tensor([2]), 1e4).requires_grad_()
    (gradient,) = torch.autograd.grad(marginal_loss(logits, target, known([1, 1, 1], [1, 0, 1])), logits)
    assert gradient.isfinite().all() and gradient.any()


def test_the_loss_stays_on_the_gpu_without_waiting(imagined_gpu):
    logits = torch.empty(2, CLASSES + 1, 6, 6, 6, device=imagined_gpu)
    target = torch.empty(2, 1, 6, 6, 6, dtype=torch.int64, device=imagined_gpu)
    loss = marginal_loss(logits, target, torch.empty(2, CLASSES + 1, dtype=torch.bool, device=imagined_gpu))
    assert loss.device == imagined_gpu and loss.shape == () and loss.dtype == torch.float32
