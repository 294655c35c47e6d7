"""The loss of a few rows, such as a batch's crops, by one program: every pair is looked at, by its definition.

Nothing is sorted and no tile is planned; the gradient is made with the loss, as all that it needs is in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixcl_dist.kernels.batch import Batch
from mixcl_dist.kernels.output import empty_outputs

#: So many rows' pairs fit in a program's registers on every architecture (64 do not build for compute capability 10.0);
#: where planned tiles begin to be faster was not measured yet.
LARGEST = 32
WARPS = 8  #: 4 would hold too much each


def loss(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """What the operator returns, and the gradients of embeddings, (N, D), and temperature, 0-d, both float32."""
    embeddings = batch.embeddings
    outputs, kept = empty_outputs(embeddings), kept_like(embeddings)
    total, losses, lse, anchors, floors, similarities = outputs
    _small_kernel[(1,)](
        embeddings,
        *embeddings.stride(),
        batch.identity,
        batch.candidate_set,
        batch.set_table,
        batch.group,
        batch.row_weight,
        batch.present,
        batch.temperature,
        total,
        losses,
        lse,
        anchors,
        floors,
        similarities,
        *kept,
        len(embeddings),
        *batch.set_table.shape,
        *batch.weights,
        D=embeddings.shape[1],
        BLOCK=max(16, triton.next_power_of_2(len(embeddings))),
        num_warps=WARPS,
    )
    return outputs, kept


def kept_like(embeddings: Tensor) -> list[Tensor]:
    """Tensors like those that :func:`loss` keeps, with nothing in them."""
    return [embeddings.new_empty(shape, dtype=torch.float32) for shape in (embeddings.shape, ())]


@triton.jit
def load_part(embeddings, row, here, row_stride, feature_stride, start, D: tl.constexpr, STEP: tl.constexpr):
    """(BLOCK, STEP) float32 features from `start` on, 0 where nobody is present."""
    feature = start + tl.arange(0, STEP)
    place = embeddings + row[:, None].to(tl.int64) * row_stride + feature[None, :].to(tl.int64) * feature_stride
    return tl.load(place, mask=here[:, None] & (feature < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def equal_keys(keys, row, here):
    """Pairs of rows that have the same key, from 0 on."""
    key = tl.load(keys + row, mask=here, other=-1)
    return (key[:, None] == key[None, :]) & (key >= 0)[:, None]


@triton.jit(do_not_specialize=["N", "S", "C"])
def _small_kernel(
    embeddings,
    row_stride,
    feature_stride,
    identity,
    candidate_set,
    set_table,
    group,
    row_weight,
    present,
    temperature,
    loss,
    losses,
    lse,
    anchors,
    floors,
    similarities,
    gradient,
    of_temperature,
    N,
    S,
    C,
    identity_weight,
    label_weight,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr = 32,
):
    row = tl.arange(0, BLOCK)
    real = row < N
    here = real
    if present is not None:
        here &= tl.load(present + row, mask=real, other=0) != 0
    tau = tl.load(temperature)
    cosine = tl.zeros((BLOCK, BLOCK), tl.float32)
    poison = tl.zeros((BLOCK,), tl.float32)  # NaN if a row is not finite
    for start in range(0, D, STEP):
        part = load_part(embeddings, row, here, row_stride, feature_stride, start, D, STEP)
        cosine = tl.dot(part, tl.trans(part), cosine, input_precision="ieee")
        poison += tl.sum(part * 0.0, 1)
    s = cosine / tau
    other = here[:, None] & here[None, :] & (row[:, None] != row[None, :])
    twin = equal_keys(identity, row, here) & other
    apart = twin
    if group is not None:
        apart |= equal_keys(group, row, here)
    own_set = tl.minimum(tl.maximum(tl.load(candidate_set + row, mask=here, other=0), 0), S - 1)
    common = tl.zeros((BLOCK, BLOCK), tl.float32)
    size = tl.zeros((BLOCK,), tl.float32)
    for c in range(0, C):
        has = tl.load(set_table + own_set * C + c, mask=here, other=0).to(tl.float32)
        common += has[:, None] * has[None, :]
        size += has
    same = (common > 0) & (size[:, None] + size[None, :] == 2) & other
    differ = (common == 0) & other

    total = tl.zeros((), tl.float32)
    pull = tl.zeros((BLOCK, BLOCK), tl.float32)  # the derivative of the loss by each similarity
    for relation in tl.static_range(2):
        weight = identity_weight if relation == 0 else label_weight
        positive = tl.where(weight > 0, twin if relation == 0 else same, False)
        members = twin | (other & ~same & ~apart) if relation == 0 else same | (differ & ~apart)
        number = tl.sum(positive.to(tl.float32), 1)
        own = tl.where(number > 0, 1.0, 0.0)
        if row_weight is not None:
            own *= tl.load(row_weight + row, mask=here, other=0).to(tl.float32)
        all_weight = tl.sum(own, 0)
        share = own / tl.maximum(all_weight, 1e-37)
        top = tl.max(tl.where(members, s, float("-inf")), 1)
        top = tl.where(top > float("-inf"), top, 0.0)
        e = tl.where(members, tl.exp(s - top[:, None]), 0.0)
        sum_e = tl.sum(e, 1)
        divisor = tl.where(sum_e == 0, 1.0, sum_e)
        log_sum = top + tl.log(divisor)
        similarity = tl.sum(share * tl.sum(tl.where(positive, cosine, 0.0), 1) / tl.maximum(number, 1.0), 0)
        value = tl.sum(share * log_sum, 0) - similarity / tau + tl.sum(poison, 0)
        total += weight * value
        target = tl.where(positive, 1.0 / tl.maximum(number, 1.0)[:, None], 0.0)
        pull += (weight * share)[:, None] * (e / divisor[:, None] - target)
        is_on = here & (tl.where(weight > 0, sum_e, 0.0) != 0)
        tl.store(lse + relation * N + row, tl.where(is_on, log_sum, float("-inf")).to(tl.float64), mask=real)
        tl.store(losses + relation, value)
        tl.store(anchors + relation, tl.sum((number > 0).to(tl.int64), 0))
        tl.store(floors + relation, tl.sum(share * tl.log(tl.maximum(number, 1.0)), 0))
        tl.store(similarities + relation, tl.where(all_weight > 0, similarity, float("nan")))
    tl.store(loss, total)
    tl.store(of_temperature, -tl.sum(tl.sum(pull * cosine, 1), 0) / (tau * tau))
    pull = (pull + tl.trans(pull)) / tau
    for start in range(0, D, STEP):
        part = load_part(embeddings, row, here, row_stride, feature_stride, start, D, STEP)
        feature = start + tl.arange(0, STEP)
        place = gradient + row[:, None] * D + feature[None, :]
        tl.store(place, tl.dot(pull, part, input_precision="ieee"), mask=real[:, None] & (feature < D)[None, :])
