"""Segmentation loss for cases in which only some classes were annotated."""

from __future__ import annotations

import torch
from torch import Tensor

from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.linear import FOREGROUND_WEIGHT

SMOOTHING = 1e-5
"""In numerator and denominator of Dice, as in MONAI's `DiceLoss`."""


def marginal_loss(logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Mean Dice + cross-entropy loss over a batch, each case judged by its known classes alone.

    Background in a case means "none of the classes known here": an unknown class may lie there too. So the
    probabilities of background and all unknown classes are summed (logsumexp of their logits) before comparing.
    Dice counts the classes that the crop shows; an absent one would only say once more what cross-entropy says.

    `logits` (B, K+1, X, Y, Z) float32, channel 0 background; `target` (B, 1, X, Y, Z) integer in 0 … K, 0 wherever
    no known class lies, or `IGNORED`, where nothing is judged; `known` (B, K+1) bool, entry 0 False. Returns a
    0-d tensor. Masks instead of indices: the host never waits for a GPU to count voxels.
    """
    log_probability, target = logits.flatten(2).log_softmax(dim=1), target.flatten(2)
    return (_cross_entropy(log_probability, target, known) + _dice(log_probability, target)).mean()


def _cross_entropy(log_probability: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """(B,), 0 where nothing is judged; `log_probability` (B, K+1, N), `target` (B, 1, N)."""
    rest = log_probability.masked_fill(known[..., None], -torch.inf).logsumexp(dim=1, keepdim=True)
    judged, foreground = target != IGNORED, (target != 0) & (target != IGNORED)
    of_class = log_probability.gather(1, torch.where(foreground, target, 0).long())
    weight = judged + (FOREGROUND_WEIGHT - 1) * foreground
    surprise = -weight * torch.where(foreground, of_class, rest)
    return surprise.sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1)


def _dice(log_probability: Tensor, target: Tensor) -> Tensor:
    """(B,), mean Dice loss of the classes that the crop shows, 0 where it shows none."""
    probability = log_probability[:, 1:].exp()
    number = torch.arange(1, log_probability.shape[1], device=target.device)
    truth = target == number[:, None]
    overlap = torch.where(truth, probability, 0).sum(dim=2)
    size = truth.sum(dim=2)
    total = size + torch.where(target == IGNORED, 0, probability).sum(dim=2)
    loss = 1 - (2 * overlap + SMOOTHING) / (total + SMOOTHING)
    shown = size > 0
    return (loss * shown).sum(dim=1) / shown.sum(dim=1).clamp(min=1)
