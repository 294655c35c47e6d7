"""Rows as anchors, and the mean similarity with their positives, which costs N·D: Σ_p z_i·z_p = z_i·(Σ_p z_p)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixcl_dist.kernels.relations import partners, single_class

CHUNK = 4096


@dataclass(frozen=True)
class Anchors:
    """Rows as anchors, of the identity relation in row 0 and of the label relation in row 1."""

    key: Tensor  #: (2, N) int64; rows of one key are each other's positives
    count: Tensor  #: (2, N) int64, the number of positives; 0 everywhere for a relation that is switched off
    share: Tensor  #: (2, N), the row's part of the weighted mean over anchors


def find_anchors(
    identity: Tensor, candidate_set: Tensor, set_table: Tensor, row_weight: Tensor, active: tuple[bool, bool]
) -> Anchors:
    """Positives and weights of all rows; ``active`` says which relations are switched on."""
    key = torch.stack([partners(identity), partners(single_class(set_table, candidate_set))])
    count = torch.stack([on * (torch.bincount(k)[k] - 1) for k, on in zip(key, active, strict=True)])
    weight = torch.where(count > 0, row_weight, 0)
    total = weight.sum(1, keepdim=True)
    return Anchors(key, count, torch.where(total > 0, weight / total, 0))


def mean_positive(embeddings: Tensor, key: Tensor, count: Tensor) -> Tensor:
    """(N,) the mean of z_i·z_p over the positives p of each row i; 0 for a row without any."""
    # float64: a class of 10⁵ rows, added one by one in float32, would lose two digits.
    sums = embeddings.new_zeros(int(key.max()) + 1, embeddings.shape[1], dtype=torch.float64)
    for rows in _chunks(len(key)):
        sums.index_add_(0, key[rows], embeddings[rows].double())
    sums = sums.to(embeddings.dtype)
    result = torch.zeros_like(embeddings[:, 0])
    for rows in _chunks(len(key)):
        z = embeddings[rows]
        result[rows] = (z * (sums.index_select(0, key[rows]) - z)).sum(1) / count[rows].clamp(min=1)
    return torch.where(count > 0, result, 0)


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK))
