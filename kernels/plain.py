"""The loss and its gradient in plain PyTorch, by the tiled sweeps: on CPUs, and of what the kernels do not take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mixcl_dist.kernels import tiled
from mixcl_dist.kernels.batch import Batch
from mixcl_dist.kernels.distributed import Alone, Peers
from mixcl_dist.kernels.relations import Contrast, Keys, row_keys
from mixcl_dist.kernels.tiled import RowScalars


class Known(NamedTuple):
    """What is known of the rows of all processes."""

    keys: Keys
    relations: Tensor  #: (S, S) uint8
    active: int  #: bits of the relations that are switched on
    positives: Tensor  #: (2, N) int64, the number of a row's positives, of the identity and of the label relation
    share: Tensor  #: (2, N), the row's part of the weighted mean over anchors


def loss(batch: Batch, process_group: str) -> tuple[list[Tensor], list[Tensor]]:
    """What the operator returns, and that the gradient goes on from nothing."""
    if batch.present is not None:
        rows = batch.present.nonzero()[:, 0]
        (total, losses, lse, *rest), kept = loss(batch.only(rows), process_group)
        every = lse.new_full((2, len(batch.embeddings)), -torch.inf).index_copy(1, rows, lse)
        return [total, losses, every, *rest], kept
    peers = batch.join(process_group, "forward", implementation="tiled")
    tau, known = batch.temperature, _know(batch, peers)
    rows = batch.embeddings.to(tau.dtype)
    lse = torch.full((2, len(rows)), -torch.inf, dtype=torch.float64, device=rows.device)
    positive = torch.zeros_like(lse)
    for _, contrast in _contrasts(peers, known, rows, tau):
        part = tiled.log_sums(contrast)
        lse, positive = torch.logaddexp(lse, part[0]), positive + part[1]
    count, share = known.positives[:, peers.own], known.share[:, peers.own]
    cosine = positive / count.clamp(min=1)
    terms = torch.where(count > 0, lse - cosine / tau.double(), 0)
    poison = (rows * 0).sum()  # NaN if any embedding is not finite, also one that no other row sees
    sums = torch.cat([(share * terms).sum(1) + poison, (share * cosine).sum(1)])
    losses, similarities = peers.sum(sums).to(tau.dtype).split(2)
    similarities = torch.where(known.share.any(1), similarities, torch.nan)
    floors = (known.share * known.positives.clamp(min=1).to(tau.dtype).log()).sum(1)
    total = batch.weights[0] * losses[0] + batch.weights[1] * losses[1]
    return [total, losses.clone(), lse, (known.positives > 0).sum(1), floors, similarities], []


def gradient(
    batch: Batch, process_group: str, upstream: Tensor, lse: Tensor, kept: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradients of embeddings and temperature; ``lse`` is (2, N) float64, ``upstream`` 0-d."""
    if batch.present is not None:
        rows = batch.present.nonzero()[:, 0]
        of_rows, of_temperature = gradient(batch.only(rows), process_group, upstream, lse[:, rows], kept)
        return torch.zeros_like(batch.embeddings, memory_format=torch.contiguous_format).index_copy(
            0, rows, of_rows
        ), of_temperature
    same = {"implementation": "tiled", "upstream gradient": upstream}
    peers = batch.join(process_group, "backward", **same)
    tau, known = batch.temperature, _know(batch, peers)
    rows = batch.embeddings.to(tau.dtype)
    result: Tensor | None = None
    product = torch.zeros((), dtype=torch.float64, device=rows.device)
    share = torch.stack([weight * part for weight, part in zip(batch.weights, known.share, strict=True)])
    scalars = RowScalars(peers.gather(lse.T.contiguous()).T, share, share / known.positives.clamp(min=1))
    # Frameworks average parameters' gradients over processes, of which each has a part of the sum.
    scale = peers.size * upstream / tau
    dtype = tau.dtype if peers.size > 1 else batch.embeddings.dtype  # in which several blocks' parts are added up
    for block, contrast in _contrasts(peers, known, rows, tau):
        part, products = tiled.gradient(contrast, scalars.of(peers.own), scalars.of(block), scale, dtype)
        result = part if result is None else result.add_(part)
        product += products.sum()
    result = rows.new_zeros(rows.shape) if result is None else result
    # Every similarity is z_i·z_j / τ, so scaling all rows and scaling 1/√τ are the same move.
    return result.to(batch.embeddings.dtype), -product / (2 * tau)


def _know(batch: Batch, peers: Alone | Peers) -> Known:
    identity, candidate_set = peers.gather(batch.identity), peers.gather(batch.candidate_set.long())
    group = None if batch.group is None else peers.gather(batch.group.long())
    keys, relations, count = row_keys(identity, candidate_set, batch.set_table, group)
    on = [weight > 0 for weight in batch.weights]
    for relation in range(2):
        if not on[relation]:
            count[relation] = 0
    weight = (count > 0).double()
    if batch.row_weight is not None:
        weight *= peers.gather(batch.row_weight.double())
    share = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return Known(keys, relations, on[0] * 0b01 | on[1] * 0b10, count, share.to(batch.temperature.dtype))


def _contrasts(peers: Alone | Peers, known: Known, rows: Tensor, tau: Tensor) -> Iterator[tuple[slice, Contrast]]:
    """Own rows against the columns of all processes, as many at a time as travel together, and which those are."""
    if known.active:
        own = known.keys.of(peers.own)
        for block, columns in _own_apart(peers, rows):
            if len(rows) and len(columns):
                yield block, Contrast(rows, own, columns, known.keys.of(block), known.relations, tau, known.active)


def _own_apart(peers: Alone | Peers, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The blocks of all processes, own rows as the very tensor: they are swept against themselves in half the time."""
    for block, columns in peers.blocks(rows):
        if peers.size == 1 or block != slice(None):
            yield block, columns
        else:
            start, stop = peers.own.start, peers.own.stop
            yield peers.own, rows
            yield slice(0, start), columns[:start]
            yield slice(stop, len(columns)), columns[stop:]
