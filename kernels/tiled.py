"""Two sweeps over all pairs of rows, tile by tile, in plain PyTorch: O(N·D) memory, the same bits every run.

Rows are sorted by candidate set and identity, so that most tiles hold one relation and need no mask. The
similarity is symmetric and so is every mask: only tiles on and above the diagonal are computed, and each
serves its rows and its columns. README.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mixcl_dist.kernels.relations import DIFF, SAME, partners, relation_table, sort_order

BLOCK = 512  #: a tile of float32 similarities then fits in a core's second-level cache

#: exp(s) needs no shift while |s| stays below this: a million times exp(60) is 10³², where float32 reaches to
#: 10³⁸, and exp(-60) is 10⁻²⁶, where its normal numbers begin at 10⁻³⁸.
UNSHIFTED_LIMIT = 60.0

#: Membership bits as a slice of the two relations: identity, label or both.
MEMBERS = {0b01: slice(0, 1), 0b10: slice(1, 2), 0b11: slice(0, 2)}


class Part(NamedTuple):
    """What the pairs of a tile are to one relation, or to both."""

    relation: slice
    members: Tensor | bool  #: the pairs in the log-sum-exp: a mask, or True where all are
    positives: Tensor | bool  #: the positive pairs: a mask, or True or False for all of them


class SortedRows(NamedTuple):
    """Rows in the order of their candidate sets and identities, cut into blocks."""

    order: Tensor  #: (N,) int64, where each sorted row comes from
    embeddings: Tensor  #: (N, D) float32 or float64, over the root of the temperature
    identity: Tensor  #: (N,) int64, equal for twins only
    group: Tensor | None  #: (N,) int64, equal for rows of one group only
    candidate_set: Tensor  #: (N,) int64, index into relations
    relations: Tensor  #: (S, S) uint8
    blocks: list[slice]
    sets_in_block: Tensor  #: (number of blocks, S) bool


def sort_rows(
    embeddings: Tensor,
    identity: Tensor,
    candidate_set: Tensor,
    set_table: Tensor,
    group: Tensor | None,
    temperature: Tensor,
) -> SortedRows:
    """Sort and scale rows; ``embeddings`` in the dtype to compute in."""
    sets, renumbered = torch.unique(set_table, dim=0, return_inverse=True)  # equal sets become one
    candidate_set = renumbered[candidate_set]
    order = sort_order(candidate_set, identity)
    candidate_set = candidate_set[order]
    rows = len(order)
    blocks = [slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK)]
    sets_in_block = torch.zeros(len(blocks), len(sets), dtype=torch.bool, device=order.device)
    sets_in_block[torch.arange(rows, device=order.device) // BLOCK, candidate_set] = True
    return SortedRows(
        order,
        # Scaling both factors alike gives s_ij and s_ji the same bits: a softmax then fits its denominator.
        embeddings[order] / temperature.sqrt(),
        partners(identity[order]),
        None if group is None else partners(group[order]),
        candidate_set,
        relation_table(sets),
        blocks,
        sets_in_block,
    )


def log_sums(rows: SortedRows, active: int) -> Tensor:
    """(2, N) float64 ``lse`` of both relations in sorted order, −inf for one that is not active.

    Float64, because near convergence the gradient is the small difference of a softmax and 1: a float32
    ``lse`` of 16 is off by 10⁻⁶, which is 1 % of a difference of 10⁻⁴.
    """
    z = rows.embeddings
    if not _is_unshifted(z):
        return _log_sums_wide(rows, active)
    sums = z.new_zeros(2, len(z))
    for left, right, parts in _tiles(rows, active):
        e = (z[left] @ z[right].T).exp_()
        for part in parts:
            terms = e * _factor(part.members) if isinstance(part.members, Tensor) else e
            sums[part.relation, left] += terms.sum(1)
            if left != right:
                sums[part.relation, right] += terms.sum(0)
    return sums.double().log_()


def _log_sums_wide(rows: SortedRows, active: int) -> Tensor:
    z = rows.embeddings
    lse = z.new_full((2, len(z)), -torch.inf, dtype=torch.float64)
    for left, right, parts in _tiles(rows, active):
        s = (z[left] @ z[right].T).double()
        for part in parts:
            terms = s.masked_fill(~part.members, -torch.inf) if isinstance(part.members, Tensor) else s
            lse[part.relation, left] = torch.logaddexp(lse[part.relation, left], terms.logsumexp(1))
            if left != right:
                lse[part.relation, right] = torch.logaddexp(lse[part.relation, right], terms.logsumexp(0))
    return lse


def weighted_rows(rows: SortedRows, active: int, lse: Tensor, share: Tensor, pull: Tensor) -> Tensor:
    """(N, D) Σ_j (g_ij + g_ji) z_j / √τ in sorted order, where g_ij is the derivative of the loss by s_ij.

    Args:
        lse: (2, N), as :func:`log_sums` gave it.
        share: (2, N), the derivative of the loss by ``lse``.
        pull: (2, N), minus the derivative of the loss by the similarity of a row with each of its positives.
    """
    z = rows.embeddings
    result = torch.zeros_like(z)
    unshifted = _is_unshifted(z)
    scale = torch.where(share > 0, share * torch.exp(-lse), 0).to(z.dtype)
    for left, right, parts in _tiles(rows, active):
        s = z[left] @ z[right].T
        if unshifted:
            factor = sum(_pair_sum(scale, part.relation, left, right, part.members) for part in parts)
            weight = s.exp_().mul_(factor)
        else:
            weight = _softmax_wide(s.double(), lse, share, left, right, parts).to(z.dtype)
        for part in parts:
            if part.positives is not False:
                weight -= _pair_sum(pull, part.relation, left, right, part.positives)
        result[left].addmm_(weight, z[right])
        if left != right:
            result[right].addmm_(weight.T, z[left])
    return result


def _pair_sum(values: Tensor, relation: slice, left: slice, right: slice, mask: Tensor | bool) -> Tensor:
    """What pairs of rows have together, over the relations named; 0 outside of the mask."""
    total = values[relation, left].sum(0)[:, None] + values[relation, right].sum(0)
    return total.mul_(_factor(mask)) if isinstance(mask, Tensor) else total


def _factor(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8)  # PyTorch multiplies by bytes several times faster than by booleans


def _softmax_wide(s: Tensor, lse: Tensor, share: Tensor, left: slice, right: slice, parts: list[Part]) -> Tensor:
    """Σ_r share_i exp(s_ij − lse_i) + share_j exp(s_ij − lse_j): no exponent of a member pair is above 0."""
    total = torch.zeros_like(s)
    for part in parts:
        for r in range(2)[part.relation]:
            terms = share[r, left, None] * torch.exp(s - lse[r, left, None])
            terms += share[r, right] * torch.exp(s - lse[r, right])
            total += terms.masked_fill_(~part.members, 0) if isinstance(part.members, Tensor) else terms
    return total


def _is_unshifted(embeddings: Tensor) -> bool:
    return bool(embeddings.square().sum(1).max() < UNSHIFTED_LIMIT)


def _tiles(rows: SortedRows, active: int) -> Iterator[tuple[slice, slice, list[Part]]]:
    """Tiles on and above the diagonal that take part in an active relation."""
    for first, left in enumerate(rows.blocks):
        for right, uniform in zip(rows.blocks[first:], _uniform_relations(rows, first), strict=True):
            if not uniform:
                yield left, right, _masked_parts(rows, left, right, active)
            elif uniform & active:
                yield left, right, [Part(MEMBERS[uniform & active], True, uniform == SAME)]


def _uniform_relations(rows: SortedRows, first: int) -> list[int]:
    """The relation of block ``first`` with each block from it on; 0 where pairs of the tile differ."""
    relations, here = rows.relations[rows.sets_in_block[first]], rows.sets_in_block[first:]
    lowest = torch.where(here, relations.amin(0), DIFF).amin(1)
    highest = torch.where(here, relations.amax(0), 0).amax(1)
    uniform = torch.where(lowest == highest, lowest, 0)
    start = rows.blocks[first].start
    for key in (rows.identity, rows.group):
        if key is not None:
            in_block = torch.zeros(len(rows.order), dtype=torch.bool, device=key.device)
            in_block[key[rows.blocks[first]]] = True
            uniform[in_block[key[start:]].nonzero() // BLOCK] = 0
    return uniform.tolist()


def _masked_parts(rows: SortedRows, left: slice, right: slice, active: int) -> list[Part]:
    columns = rows.relations.index_select(1, rows.candidate_set[right])
    relation = columns.index_select(0, rows.candidate_set[left])
    same = relation == SAME
    twin = rows.identity[left, None] == rows.identity[right]
    linked = twin if rows.group is None else twin | (rows.group[left, None] == rows.group[right])
    in_identity = twin | ~(same | linked)
    in_label = same | (relation == DIFF) & ~linked
    if left == right:
        for mask in (same, twin, in_identity, in_label):
            mask.fill_diagonal_(False)
    parts = {0b01: Part(MEMBERS[0b01], in_identity, twin), 0b10: Part(MEMBERS[0b10], in_label, same)}
    return [part for bit, part in parts.items() if bit & active]
