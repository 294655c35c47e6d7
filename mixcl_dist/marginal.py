"""Segmentation loss for cases in which only some classes were annotated."""

from __future__ import annotations

import torch
from monai.losses import DiceCELoss
from torch import Tensor


def marginal_loss(logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Mean Dice + cross-entropy loss over a batch, each case judged by its known classes alone.

    Background in a case means "none of the classes known here": an unknown class may lie there too. So the
    probabilities of background and all unknown classes are summed (logsumexp of their logits) before comparing.

    `logits` (B, K+1, X, Y, Z) float32, channel 0 background; `target` (B, 1, X, Y, Z) integer in 0 … K, 0 wherever
    no known class lies; `known` (B, K+1) bool, entry 0 False. Returns a 0-d tensor.
    """
    criterion = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    losses = []
    for case_logits, case_target, case_known in zip(logits, target, known, strict=True):
        rest = case_logits[~case_known].logsumexp(dim=0, keepdim=True)
        merged = torch.cat([rest, case_logits[case_known]])
        channel = torch.where(case_known, case_known.cumsum(0), 0)
        losses.append(criterion(merged[None], channel[case_target.long()][None]))
    return torch.stack(losses).mean()
