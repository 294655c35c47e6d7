"""Segmentation loss for cases in which only some classes were annotated."""

from __future__ import annotations

import torch
from monai.losses import DiceLoss
from torch import Tensor
from torch.nn import functional as F

from mixcl_dist.data_shards.catalogue import IGNORED

FOREGROUND_WEIGHT = 5.0
"""Of a class's voxel in the cross-entropy, where one of the background has 1: organs are a few percent of a crop."""


def marginal_loss(logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Mean Dice + cross-entropy loss over a batch, each case judged by its known classes alone.

    Background in a case means "none of the classes known here": an unknown class may lie there too. So the
    probabilities of background and all unknown classes are summed (logsumexp of their logits) before comparing.
    Dice counts the classes that the crop shows; an absent one would only say once more what cross-entropy says.

    `logits` (B, K+1, X, Y, Z) float32, channel 0 background; `target` (B, 1, X, Y, Z) integer in 0 … K, 0 wherever
    no known class lies, or `IGNORED`, where nothing is judged; `known` (B, K+1) bool, entry 0 False. Returns a
    0-d tensor.
    """
    losses = []
    for case_logits, case_target, case_known in zip(logits, target, known, strict=True):
        rest = case_logits[~case_known].logsumexp(dim=0, keepdim=True)
        merged = torch.cat([rest, case_logits[case_known]])
        channel = torch.where(case_known, case_known.cumsum(0), 0)
        judged = case_target[0] != IGNORED
        losses.append(_dice_and_cross_entropy(merged[:, judged][None], channel[case_target[:, judged].long()][None]))
    return torch.stack(losses).mean()


def _dice_and_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """`logits` (1, K+1, N), `target` (1, 1, N) int64, of N voxels."""
    classes = logits.shape[1]
    if not target.numel():
        return 0 * logits.sum()  # nothing to learn, but a graph
    weight = torch.full((classes,), FOREGROUND_WEIGHT, device=logits.device)
    weight[0] = 1
    cross_entropy = F.cross_entropy(logits, target[:, 0], weight=weight)
    present = torch.bincount(target.flatten(), minlength=classes)[1:] > 0
    if not present.any():
        return cross_entropy
    dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, reduction="none")
    return cross_entropy + dice(logits, target).flatten()[present].mean()
