"""The loss as an operator that autograd, autocast and the compiler take whole."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mixcl_dist.kernels import plain
from mixcl_dist.kernels.batch import Batch
from mixcl_dist.kernels.checks import check_values
from mixcl_dist.kernels.implementation import choose
from mixcl_dist.kernels.output import compute_dtype, empty_outputs


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The outputs of :func:`mixcl_dist.kernels.output.empty_outputs`, and what the backward goes on from."""
    if embeddings.device.type == "cpu":  # elsewhere the checks would wait for the device
        check_values(candidate_set, set_table, temperature, row_weight)
    weights = identity_weight, label_weight
    tau = temperature.to(compute_dtype(embeddings))
    batch = Batch(embeddings, identity, candidate_set, set_table, group, tau, row_weight, present, weights)
    with torch.cuda.device_of(embeddings):
        outputs, kept = _computed_by(implementation, embeddings).loss(batch, process_group)
    return *outputs, kept


@mixed_contrastive.register_fake
def _(embeddings, identity, candidate_set, set_table, group, temperature, row_weight, present, *settings):
    *_, process_group, implementation = settings
    computed_by = _computed_by(implementation, embeddings)
    kept = [] if process_group or computed_by is plain else computed_by.kept_like(embeddings, set_table, group)
    return *empty_outputs(embeddings), kept


@torch.library.custom_op("mixcl_dist::mixed_contrastive_backward", mutates_args=())
def mixed_contrastive_backward(
    upstream: Tensor,
    lse: Tensor,
    kept: list[Tensor],
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
    tau = temperature.to(compute_dtype(embeddings))
    batch = Batch(embeddings, identity, candidate_set, set_table, group, tau, row_weight, present, weights)
    with torch.cuda.device_of(embeddings):
        computed_by = _computed_by(implementation, embeddings)
        gradient, of_temperature = computed_by.gradient(batch, process_group, upstream, lse, kept)
    return gradient, of_temperature.to(temperature.dtype)


@mixed_contrastive_backward.register_fake
def _(upstream, lse, kept, embeddings, identity, candidate_set, set_table, group, temperature, *rest):
    return embeddings.new_empty(embeddings.shape), torch.empty_like(temperature)


def _computed_by(implementation: str, embeddings: Tensor) -> ModuleType:
    if choose(implementation, embeddings) == "tiled":
        return plain
    from mixcl_dist.kernels import fused  # and with it Triton, which not every platform has

    return fused


def _save(ctx, inputs, output):
    *tensors, ctx.identity_weight, ctx.label_weight, ctx.process_group, ctx.implementation = inputs
    *_, kept = output
    ctx.mark_non_differentiable(*output[1:-1], *kept)
    ctx.set_materialize_grads(False)  # or each of them would be given zeros
    ctx.arguments = len(tensors)
    ctx.save_for_backward(output[2], *tensors, *kept)


def _backward(ctx, upstream, *_):
    if upstream is None:
        return (None,) * 12
    settings = ctx.identity_weight, ctx.label_weight, ctx.process_group, ctx.implementation
    lse, *saved = ctx.saved_tensors
    tensors, kept = saved[: ctx.arguments], saved[ctx.arguments :]
    with torch.autocast(upstream.device.type, enabled=False):
        embeddings, temperature = mixed_contrastive_backward(upstream, lse, kept, *tensors, *settings)
    return embeddings, None, None, None, None, temperature, None, None, None, None, None, None


def _refuse_double_backward(ctx, *_):
    raise RuntimeError(
        "mixed_contrastive_loss has no second derivative (double backward); "
        'implementation="reference" has one, at O(N^2) memory'
    )


mixed_contrastive.register_autograd(_backward, setup_context=_save)
mixed_contrastive_backward.register_autograd(_refuse_double_backward)
