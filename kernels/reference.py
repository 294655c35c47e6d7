"""The mixed contrastive loss as it is defined: dense, O(N²) memory, differentiated by autograd.

This is the truth that every other path is tested against; README.md has the same formulas in words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixcl_dist.kernels.output import MixedContrastiveOutput
from mixcl_dist.kernels.relations import DIFF, SAME, relation_table


def mixed_contrastive_reference(
    embeddings: Tensor,
    identity: Tensor,
    candidate_set: Tensor,
    set_table: Tensor,
    group: Tensor | None,
    temperature: Tensor,
    row_weight: Tensor | None,
    present: Tensor | None,
    identity_weight: float,
    label_weight: float,
) -> MixedContrastiveOutput:
    """The arguments and the result of :func:`mixcl_dist.kernels.mixed_contrastive_loss`, already checked."""
    z = embeddings.double() if embeddings.dtype == torch.float64 else embeddings.float()
    if present is not None:
        z = torch.where(present[:, None], z, 0)
    cosine = z @ z.T
    similarity = cosine / temperature
    other = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    if present is not None:
        other = other & present[:, None] & present[None, :]
    twin = _equal(identity) & other
    apart = torch.zeros_like(other) if group is None else _equal(group)
    relation = relation_table(set_table)[candidate_set[:, None], candidate_set[None, :]]
    same, differ = (relation == SAME) & other, (relation == DIFF) & other
    weight = torch.ones_like(z[:, 0]) if row_weight is None else row_weight.detach().to(z)

    identity_terms = _relation(similarity, cosine, twin, other & ~(same | apart) | twin, weight, identity_weight > 0)
    label_terms = _relation(similarity, cosine, same, differ & ~(twin | apart) | same, weight, label_weight > 0)
    poison = (z * 0).sum()  # NaN if any embedding is not finite, also one that no other row sees
    losses = [terms[0] + poison for terms in (identity_terms, label_terms)]
    lse, anchors, floor, mean = (
        [a.detach(), b.detach()] for a, b in zip(identity_terms[1:], label_terms[1:], strict=True)
    )
    total = identity_weight * losses[0] + label_weight * losses[1]
    return MixedContrastiveOutput._make(
        [total, *(loss.detach() for loss in losses), torch.stack(lse), *anchors, *floor, *mean]
    )


def _equal(key: Tensor) -> Tensor:
    return (key[:, None] == key[None, :]) & (key >= 0)


def _relation(
    similarity: Tensor, cosine: Tensor, positive: Tensor, member: Tensor, weight: Tensor, active: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One relation's loss, ``lse``, number of anchors, floor and mean positive cosine."""
    positive, member = positive & active, member & active
    count = positive.sum(1)
    anchor = count > 0
    total = (weight * anchor).sum()
    share = torch.where(anchor & (total > 0), weight / total, 0)
    mean_positive = torch.where(positive, similarity, 0).sum(1) / count.clamp(min=1)
    lse = similarity.masked_fill(~member, -torch.inf).logsumexp(1)
    loss = (share * torch.where(anchor, lse - mean_positive, 0)).sum()
    floor = (share * count.clamp(min=1).to(cosine).log()).sum()
    mean_cosine = (share * torch.where(positive, cosine, 0).sum(1) / count.clamp(min=1)).sum()
    return loss, lse, anchor.sum(), floor, torch.where(total > 0, mean_cosine, torch.nan)
