"""The loss as an operator that autograd, autocast and the compiler take whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixcl_dist.kernels import tiled
from mixcl_dist.kernels.checks import check_values
from mixcl_dist.kernels.distributed import join
from mixcl_dist.kernels.implementation import choose
from mixcl_dist.kernels.relations import Contrast, Keys, row_keys
from mixcl_dist.kernels.tiled import RowScalars


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
    present: Tensor | None,
    identity_weight: float,
    label_weight: float,
    process_group: str,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, and of both relations losses, lse (in float64), numbers of anchors, floors and similarities."""
    if embeddings.device.type == "cpu":  # elsewhere the checks would wait for the device
        check_values(candidate_set, set_table, temperature, row_weight)
    weights = identity_weight, label_weight
    kept, length = _kept(present), len(embeddings)
    embeddings, identity, candidate_set, group, row_weight = _take(
        kept, embeddings, identity, candidate_set, group, row_weight
    )
    implementation = choose(implementation, embeddings)
    peers = join(
        process_group, embeddings, _settings("forward", implementation, set_table, temperature, weights, group)
    )
    tau = temperature.to(compute_dtype(embeddings))
    batch = _batch(peers, identity, candidate_set, set_table, group, row_weight, weights, tau.dtype)
    rows = embeddings if implementation == "triton" else embeddings.to(tau.dtype)
    lse = torch.full((2, len(rows)), -torch.inf, dtype=torch.float64, device=rows.device)
    positive = torch.zeros_like(lse)
    log_sums, _ = _sweeps(implementation)
    for _, contrast in _contrasts(peers, batch, rows, tau):
        part = log_sums(contrast)
        lse, positive = torch.logaddexp(lse, part[0]), positive + part[1]
    count, share = batch.positives[:, peers.own], batch.share[:, peers.own]
    cosine = positive / count.clamp(min=1)
    terms = torch.where(count > 0, lse - cosine / tau.double(), 0)
    poison = (rows * 0).sum()  # NaN if any embedding is not finite, also one that no other row sees
    sums = torch.cat([(share * terms).sum(1) + poison, (share * cosine).sum(1)])
    losses, similarities = peers.sum(sums).to(tau.dtype).split(2)
    similarities = torch.where(batch.share.any(1), similarities, torch.nan)
    floors = (batch.share * batch.positives.clamp(min=1).to(tau.dtype).log()).sum(1)
    loss = identity_weight * losses[0] + label_weight * losses[1]
    if kept is not None:
        lse = lse.new_full((2, length), -torch.inf).index_copy(1, kept, lse)
    return loss, losses.clone(), lse, (batch.positives > 0).sum(1), floors, similarities


@mixed_contrastive.register_fake
def _(embeddings, identity, candidate_set, set_table, group, temperature, row_weight, present, *settings):
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
    present: Tensor | None,
    identity_weight: float,
    label_weight: float,
    process_group: str,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of the embeddings and the temperature, of which frameworks take the mean over processes."""
    weights = identity_weight, label_weight
    kept, length = _kept(present), len(embeddings)
    embeddings, identity, candidate_set, group, row_weight, lse = _take(
        kept, embeddings, identity, candidate_set, group, row_weight, lse.T
    )
    implementation = choose(implementation, embeddings)
    settings = _settings("backward", implementation, set_table, temperature, weights, group)
    peers = join(process_group, embeddings, settings | {"upstream gradient": upstream})
    tau = temperature.to(compute_dtype(embeddings))
    batch = _batch(peers, identity, candidate_set, set_table, group, row_weight, weights, tau.dtype)
    rows = embeddings if implementation == "triton" else embeddings.to(tau.dtype)
    gradient: Tensor | None = None
    product = torch.zeros((), dtype=torch.float64, device=rows.device)
    share = torch.stack([weight * part for weight, part in zip(weights, batch.share, strict=True)])
    scalars = RowScalars(peers.gather(lse.contiguous()).T, share, share / batch.positives.clamp(min=1))
    # Frameworks average parameters' gradients over processes, of which each has a part of the sum.
    scale = peers.size * upstream / tau
    dtype = tau.dtype if peers.use_ring(rows) else embeddings.dtype
    _, weigh = _sweeps(implementation)
    for block, contrast in _contrasts(peers, batch, rows, tau):
        part, products = weigh(contrast, scalars.of(peers.own), scalars.of(block), scale, dtype)
        gradient = part if gradient is None else gradient.add_(part)
        product += products.sum()
    # Every similarity is z_i·z_j / τ, so scaling all rows and scaling 1/√τ are the same move.
    gradient = embeddings.new_zeros(embeddings.shape) if gradient is None else gradient.to(embeddings.dtype)
    if kept is not None:
        gradient = gradient.new_zeros(length, gradient.shape[1]).index_copy(0, kept, gradient)
    return gradient, (-product / (2 * tau)).to(temperature.dtype)


@mixed_contrastive_backward.register_fake
def _(upstream, lse, embeddings, identity, candidate_set, set_table, group, temperature, *rest):
    return embeddings.new_empty(embeddings.shape), torch.empty_like(temperature)


def _kept(present: Tensor | None) -> Tensor | None:
    return None if present is None else present.nonzero()[:, 0]


def _take(kept: Tensor | None, *values: Tensor | None) -> tuple[Any, ...]:
    """Those of the rows that are present."""
    return values if kept is None else tuple(None if value is None else value[kept] for value in values)


class _Batch(NamedTuple):
    """What is known of the rows of all processes."""

    keys: Keys
    relations: Tensor  #: (S, S) uint8
    active: int  #: bits of the relations that are switched on
    positives: Tensor  #: (2, N) int64, the number of a row's positives, of the identity and of the label relation
    share: Tensor  #: (2, N), the row's part of the weighted mean over anchors


def _batch(peers, identity, candidate_set, set_table, group, row_weight, weights, dtype) -> _Batch:
    identity, candidate_set = peers.gather(identity), peers.gather(candidate_set.long())
    group = None if group is None else peers.gather(group.long())
    keys, relations, count = row_keys(identity, candidate_set, set_table, group)
    on = [weight > 0 for weight in weights]
    for relation in range(2):
        if not on[relation]:
            count[relation] = 0
    weight = (count > 0).double()
    if row_weight is not None:
        weight *= peers.gather(row_weight.double())
    share = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return _Batch(keys, relations, on[0] * 0b01 | on[1] * 0b10, count, share.to(dtype))


def _settings(name, implementation, set_table, temperature, weights, group) -> dict[str, object]:
    """What has to be the same on all processes."""
    return {
        "pass": name,
        "implementation": implementation,
        "set_table": set_table,
        "temperature": temperature,
        "identity_weight": weights[0],
        "label_weight": weights[1],
        "group": "None" if group is None else "given",
    }


def _contrasts(peers, batch, rows, tau) -> Iterator[tuple[slice, Contrast]]:
    """Own rows against the columns of all processes, as many at a time as travel together, and which those are."""
    if batch.active:
        own = batch.keys.of(peers.own)
        for block, columns in peers.blocks(rows):
            if len(rows) and len(columns):
                yield block, Contrast(rows, own, columns, batch.keys.of(block), batch.relations, tau, batch.active)


def _sweeps(implementation: str) -> tuple[Callable, Callable]:
    """What computes log-sum-exps, and what computes the gradient."""
    if implementation == "tiled":
        return tiled.log_sums, tiled.gradient
    from mixcl_dist.kernels import backward, forward

    return forward.log_sums, backward.gradient


def _save(ctx, inputs, output):
    *tensors, ctx.identity_weight, ctx.label_weight, ctx.process_group, ctx.implementation = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2], *tensors)


def _backward(ctx, upstream, *_):
    settings = ctx.identity_weight, ctx.label_weight, ctx.process_group, ctx.implementation
    with torch.autocast(upstream.device.type, enabled=False):
        embeddings, temperature = mixed_contrastive_backward(upstream, *ctx.saved_tensors, *settings)
    return embeddings, None, None, None, None, temperature, None, None, None, None, None, None


def _refuse_double_backward(ctx, *_):
    raise RuntimeError(
        "mixed_contrastive_loss has no second derivative (double backward); "
        'implementation="reference" has one, at O(N^2) memory'
    )


mixed_contrastive.register_autograd(_backward, setup_context=_save)
mixed_contrastive_backward.register_autograd(_refuse_double_backward)
