"""The loss and its gradient by the Triton kernels: sort, plan and sweep the rows of one process, or of many.

A call of one process makes some 40 launches, forward and backward together, at any number of rows, and never waits for
the device, so that a CUDA graph can hold it. What the forward has sorted, the backward goes on from.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixcl_dist.kernels import backward, forward, small, triangle
from mixcl_dist.kernels.batch import Batch
from mixcl_dist.kernels.distributed import Alone, Peers
from mixcl_dist.kernels.implementation import held_dtype
from mixcl_dist.kernels.index import Index, active_bits, for_columns, make_index, packed_width, share_of
from mixcl_dist.kernels.output import empty_outputs
from mixcl_dist.kernels.plan import Side, plan_tiles, sort_side
from mixcl_dist.kernels.tuning import Launch, launch_for, launches_for


def loss(batch: Batch, process_group: str) -> tuple[list[Tensor], list[Tensor]]:
    """What the operator returns, and in one process what :func:`gradient` goes on from."""
    batch = batch.contiguous()
    if _is_small(batch.embeddings) and not process_group:
        return small.loss(batch)
    peers = batch.join(process_group, "forward", implementation="triton")
    launch, _ = launches_for(batch.embeddings)
    index, own = _sort(batch, peers)
    active, out, earlier = active_bits(batch.weights), None, None
    for columns, related in _columns(batch, peers, index, own):
        earlier = None if out is None else forward.fold(out, earlier)
        out = _forward_sweep(own, columns, related, batch.temperature, active, launch)
    outputs = empty_outputs(batch.embeddings)
    total, losses, lse, anchors, floors, similarities = outputs
    assert out is not None, "everybody meets a block, if an empty one"
    sums = forward.finish(out, earlier, own, index, peers.own, batch.temperature, active, lse)
    _output_kernel[(1,)](peers.sum(sums), index.totals, total, losses, anchors, floors, similarities, *batch.weights)
    return outputs, [*index, *own] if peers.size == 1 else []


def gradient(
    batch: Batch, process_group: str, upstream: Tensor, lse: Tensor, kept: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradients of embeddings and temperature.

    Args:
        upstream: 0-d, the gradient of the loss.
        lse: (2, n) float64 of the process's rows.
        kept: what :func:`loss` has kept.
    """
    batch = batch.contiguous()
    if _is_small(batch.embeddings) and not process_group:
        of_embeddings, of_temperature = (of_loss * upstream for of_loss in kept or small.loss(batch)[1])
        return of_embeddings.to(batch.embeddings.dtype), of_temperature
    same = {"implementation": "triton", "upstream gradient": upstream}
    peers = batch.join(process_group, "backward", **same)
    _, launch = launches_for(batch.embeddings)
    index, own = (Index(*kept[:-4]), Side(*kept[-4:])) if kept else _sort(batch, peers)
    if peers.size > 1:
        lse = peers.gather(lse.T.contiguous()).T.contiguous()
    dtype = torch.float32 if peers.use_ring(batch.embeddings) else held_dtype(batch.embeddings.dtype)
    parts: list[backward.Gradient] = []
    for columns, related in _columns(batch, peers, index, own):
        norms = own.norm, columns.norm
        of_rows = of_columns = backward.pair_scalars(own, norms, index, lse, batch.temperature, batch.weights)
        if columns is not own:
            of_columns = backward.pair_scalars(columns, norms, index, lse, batch.temperature, batch.weights)
        part = backward.Gradient(
            torch.empty(batch.embeddings.shape, dtype=dtype, device=lse.device),
            torch.empty(launch.width // launch.out, own.keys.shape[1], dtype=torch.float32, device=lse.device),
            upstream,
            peers.size,
            peers.own.start or 0,
            batch.embeddings.dtype,
        )
        plan = plan_tiles(own, columns, related.areas, active_bits(batch.weights), launch.tile)
        backward.sweep(own, columns, plan, related, (of_rows, of_columns), part, batch.temperature, launch)
        parts = [part if not parts else parts[0].add_(part)]
    (whole,) = parts
    return whole.embeddings.to(batch.embeddings.dtype), whole.products.sum(dtype=torch.float64)


def kept_like(embeddings: Tensor, set_table: Tensor, group: Tensor | None) -> list[Tensor]:
    """Tensors like those that :func:`loss` keeps, with nothing in them."""
    if _is_small(embeddings):
        return small.kept_like(embeddings)
    # Not len(), which would tell a compiler that the number of rows never changes.
    rows, kinds, sets = embeddings.shape[0], 1 if group is None else 2, set_table.shape[0]
    launches = launches_for(embeddings)
    width, padded = launches[0].width, _padded(embeddings, launches)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return embeddings.new_empty(shape, dtype=dtype)

    index = Index(
        numbers=empty(torch.int32, kinds, rows),
        sort_key=empty(torch.int64, rows),
        sorted_key=empty(torch.int64, rows),
        order=empty(torch.int64, rows),
        common=empty(torch.float32, sets, sets),
        set_rows=empty(torch.int32, sets),
        place=empty(torch.int32, sets),
        packed_relations=empty(torch.int32, sets, packed_width(sets)),
        areas=empty(torch.int32, 3, sets + 1, sets + 1),
        positives=empty(torch.int32, 2, rows),
        weight=empty(torch.float64, 2, rows),
        totals=empty(torch.float64, 7),
    )
    side = Side(
        embeddings=empty(held_dtype(embeddings.dtype), padded, width),
        keys=empty(torch.int32, 4, padded),
        links=empty(torch.int64, kinds, rows),
        norm=empty(torch.float32),
    )
    return [*index, *side]


def _is_small(embeddings: Tensor) -> bool:
    return embeddings.shape[0] <= small.LARGEST


def _sort(batch: Batch, peers: Alone | Peers) -> tuple[Index, Side]:
    """All rows of the batch by what they are, and the process's own with their embeddings."""
    identity, candidate_set = peers.gather(batch.identity), peers.gather(batch.candidate_set)
    group, row_weight, present = (
        None if of_rows is None else peers.gather(of_rows) for of_rows in (batch.group, batch.row_weight, batch.present)
    )
    index = make_index(identity, candidate_set, batch.set_table, group, row_weight, present, batch.weights)
    return index, _side(batch.embeddings, index, peers.own)


def _columns(batch: Batch, peers: Alone | Peers, index: Index, own: Side) -> Iterator[tuple[Side, Index]]:
    """Everyone's rows, as many at a time as travel together, and the index for a sweep over them."""
    for which, embeddings in peers.blocks(batch.embeddings):
        if peers.use_ring(batch.embeddings):
            of_columns = for_columns(index, which)
            yield _side(embeddings, of_columns, which), of_columns
        else:
            yield own if embeddings is batch.embeddings else _side(embeddings, index, which), index


def _forward_sweep(own: Side, columns: Side, index: Index, temperature: Tensor, active: int, launch: Launch) -> Tensor:
    plan = plan_tiles(own, columns, index.areas, active, launch.tile)
    if not launch.tile.triangle or columns is not own:
        return forward.sweep(own, columns, plan, plan, index, temperature, launch)
    halved = triangle.divide(plan, own, launch.tile)
    out = forward.sweep(own, own, plan, halved.rest, index, temperature, launch)
    triangle.add_pair_sums(out, own, halved, temperature, launch_for(own.embeddings, "triangle"))
    return out


def _side(embeddings: Tensor, index: Index, which: slice) -> Side:
    launches = launches_for(embeddings)
    return sort_side(embeddings, index, which, _padded(embeddings, launches), launches[0].width)


def _padded(embeddings: Tensor, launches: tuple[Launch, Launch]) -> int:
    """The number of rows in whole blocks of both kernels."""
    block = max(max(launch.tile.rows, launch.tile.columns) for launch in launches)
    return max(triton.cdiv(embeddings.shape[0], block), 1) * block


@triton.jit
def _output_kernel(
    sums,  # (4,) float64
    totals,
    loss,
    losses,
    anchors,
    floors,
    similarities,
    identity_weight,
    label_weight,
):
    total = tl.zeros((), tl.float64)
    for relation in tl.static_range(2):
        value = tl.load(sums + relation)
        total += value * (identity_weight if relation == 0 else label_weight)
        weight = tl.load(totals + relation)
        tl.store(losses + relation, value)
        tl.store(anchors + relation, tl.load(totals + 2 + relation).to(tl.int64))
        tl.store(floors + relation, share_of(tl.load(totals + 4 + relation), weight))
        similarity = tl.where(weight > 0, tl.load(sums + 2 + relation), float("nan"))
        tl.store(similarities + relation, similarity)
    tl.store(loss, total)
