"""The loss as an operator that autograd, autocast and the compiler take whole."""

from __future__ import annotations

import torch
from torch import Tensor

from mixcl_dist.kernels import tiled
from mixcl_dist.kernels.checks import check_values
from mixcl_dist.kernels.positives import find_anchors, mean_positive


def compute_dtype(embeddings: Tensor) -> torch.dtype:
    return torch.float64 if embeddings.dtype == torch.float64 else torch.float32


@torch.library.custom_op("mixcl_dist::mixed_contrastive", mutates_args=())
def mixed_contrastive(
    embeddings: Tensor,
    identity: Tensor,
    candidate_set: Tensor,
    set_table: Tensor,
    group: Tensor | None,
    temperature: Tensor,
    row_weight: Tensor | None,
    identity_weight: float,
    label_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, and of both relations losses, lse (in float64), numbers of anchors, floors and similarities."""
    check_values(candidate_set, set_table, temperature, row_weight)
    z = embeddings.to(compute_dtype(embeddings))
    temperature = temperature.to(z.dtype)
    anchors = _anchors(z, identity, candidate_set, set_table, row_weight, identity_weight, label_weight)
    lse = z.new_full((2, len(z)), -torch.inf, dtype=torch.float64)
    cosine = z.new_zeros(2, len(z))
    active = _active(identity_weight, label_weight)
    if active and len(z):
        rows = tiled.sort_rows(z, identity, candidate_set, set_table, group, temperature)
        lse[:, rows.order] = tiled.log_sums(rows, active)
        for r in range(2):
            if anchors.count[r].any():
                cosine[r] = mean_positive(z, anchors.key[r], anchors.count[r])
    has_positive = anchors.count > 0
    losses = (anchors.share * torch.where(has_positive, lse - cosine / temperature, 0)).sum(1).to(z.dtype)
    losses += (z * 0).sum()  # NaN if any embedding is not finite, also one that no other row sees
    floors = (anchors.share * anchors.count.clamp(min=1).to(z.dtype).log()).sum(1)
    similarities = torch.where(anchors.share.any(1), (anchors.share * cosine).sum(1), torch.nan)
    loss = identity_weight * losses[0] + label_weight * losses[1]
    return loss, losses, lse, has_positive.sum(1), floors, similarities


@mixed_contrastive.register_fake
def _(embeddings, identity, candidate_set, set_table, group, temperature, row_weight, *weights):
    pair = embeddings.new_empty(2, dtype=compute_dtype(embeddings))
    lse = pair.new_empty(2, embeddings.shape[0], dtype=torch.float64)
    return pair.new_empty(()), pair, lse, pair.new_empty(2, dtype=torch.int64), pair.clone(), pair.clone()


@torch.library.custom_op("mixcl_dist::mixed_contrastive_backward", mutates_args=())
def mixed_contrastive_backward(
    upstream: Tensor,
    lse: Tensor,
    embeddings: Tensor,
    identity: Tensor,
    candidate_set: Tensor,
    set_table: Tensor,
    group: Tensor | None,
    temperature: Tensor,
    row_weight: Tensor | None,
    identity_weight: float,
    label_weight: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of the embeddings and the temperature."""
    z = embeddings.to(compute_dtype(embeddings))
    tau = temperature.to(z.dtype)
    gradient = torch.zeros_like(z)
    active = _active(identity_weight, label_weight)
    if active and len(z):
        anchors = _anchors(z, identity, candidate_set, set_table, row_weight, identity_weight, label_weight)
        share = anchors.share * z.new_tensor([[identity_weight], [label_weight]])
        pull = share / anchors.count.clamp(min=1)
        rows = tiled.sort_rows(z, identity, candidate_set, set_table, group, tau)
        scalars = (values[:, rows.order] for values in (lse, share, pull))
        with torch.autocast(z.device.type, enabled=False):
            gradient[rows.order] = tiled.weighted_rows(rows, active, *scalars)
    gradient *= upstream / tau.sqrt()
    # Every similarity is z_i·z_j / τ, so scaling all rows and scaling 1/√τ are the same move.
    tau_gradient = -(z * gradient).sum() / (2 * tau)
    return gradient.to(embeddings.dtype), tau_gradient.to(temperature.dtype)


@mixed_contrastive_backward.register_fake
def _(upstream, lse, embeddings, identity, candidate_set, set_table, group, temperature, *rest):
    return torch.empty_like(embeddings), torch.empty_like(temperature)


def _active(identity_weight: float, label_weight: float) -> int:
    return (identity_weight > 0) * 0b01 | (label_weight > 0) * 0b10


def _anchors(z, identity, candidate_set, set_table, row_weight, identity_weight, label_weight):
    weight = torch.ones_like(z[:, 0]) if row_weight is None else row_weight.to(z.dtype)
    return find_anchors(identity, candidate_set, set_table, weight, (identity_weight > 0, label_weight > 0))


def _save(ctx, inputs, output):
    *tensors, ctx.identity_weight, ctx.label_weight = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2], *tensors)


def _backward(ctx, upstream, *_):
    embeddings, temperature = mixed_contrastive_backward(
        upstream, *ctx.saved_tensors, ctx.identity_weight, ctx.label_weight
    )
    return embeddings, None, None, None, None, temperature, None, None, None


def _refuse_double_backward(ctx, *_):
    raise RuntimeError(
        "mixed_contrastive_loss has no second derivative (double backward); "
        'implementation="reference" has one, at O(N^2) memory'
    )


mixed_contrastive.register_autograd(_backward, setup_context=_save)
mixed_contrastive_backward.register_autograd(_refuse_double_backward)
