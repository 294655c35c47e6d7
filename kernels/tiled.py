"""Two sweeps over pairs of rows and columns, tile by tile, in plain PyTorch: O(N·D) memory, the same bits every run.

Both are sorted by candidate set and identity, so that most tiles hold one relation and need no mask. Where the
columns are the rows themselves, the similarity is symmetric and so is every mask: only tiles on and above the
diagonal are computed, and each serves its rows and its columns. README.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mixcl_dist.kernels.relations import DIFF, SAME, Contrast, Keys, sort_order

BLOCK = 512  #: a tile of float32 similarities then fits in a core's second-level cache

#: exp(s) needs no shift while |s| stays below this: a million times exp(60) is 10³², where float32 reaches to
#: 10³⁸, and exp(-60) is 10⁻²⁶, where its normal numbers begin at 10⁻³⁸.
UNSHIFTED_LIMIT = 60.0

#: Membership bits as a slice of the two relations: identity, label or both.
MEMBERS = {0b01: slice(0, 1), 0b10: slice(1, 2), 0b11: slice(0, 2)}


class RowScalars(NamedTuple):
    """What the gradient needs of a row, for identity in row 0 and label in row 1."""

    lse: Tensor  #: (2, N) float64
    share: Tensor  #: (2, N), the derivative of the loss by ``lse``
    pull: Tensor  #: (2, N), minus the derivative of the loss by the similarity with each positive

    def of(self, rows: slice | Tensor) -> RowScalars:
        return RowScalars(self.lse[:, rows], self.share[:, rows], self.pull[:, rows])


class Part(NamedTuple):
    """What the pairs of a tile are to one relation, or to both."""

    relation: slice
    members: Tensor | bool  #: the pairs in the log-sum-exp: 1 or 0 as uint8, or True where all are
    positives: Tensor | bool  #: the positive pairs: likewise, or False where none is


class SortedRows(NamedTuple):
    """Rows in the order of their candidate sets and identities, cut into blocks."""

    order: Tensor  #: (N,) int64, where each sorted row comes from
    embeddings: Tensor  #: (N, D) float32 or float64, over the root of the temperature
    keys: Keys
    blocks: list[slice]
    sets_in_block: Tensor  #: (number of blocks, S) bool


class Pairs(NamedTuple):
    """All pairs of a row and a column; ``columns`` is ``rows`` where a batch is contrasted with itself."""

    rows: SortedRows
    columns: SortedRows
    relations: Tensor  #: (S, S) uint8
    active: int  #: bits of the relations that are switched on
    keys: int  #: more than the largest identity or group


def log_sums(contrast: Contrast) -> tuple[Tensor, Tensor]:
    """Each row's ``lse`` over the columns, and its sum of similarities with positives among them.

    Rows are float32 or float64.

    Returns:
        (2, N) float64 ``lse`` of both relations, −inf for one that is not active, and (2, N) the sums of z_i·z_p.
        Float64, because near convergence the gradient is the small difference of a softmax and 1: a float32
        ``lse`` of 16 is off by 10⁻⁶, which is 1 % of a difference of 10⁻⁴.
    """
    pairs = _sort_pairs(contrast)
    sorted_lse, sorted_positive = (_log_sums if _is_unshifted(pairs) else _log_sums_wide)(pairs)
    lse, positive = torch.empty_like(sorted_lse), torch.empty_like(sorted_positive)
    lse[:, pairs.rows.order], positive[:, pairs.rows.order] = sorted_lse, sorted_positive * contrast.temperature
    return lse, positive


def gradient(
    contrast: Contrast, row_scalars: RowScalars, column_scalars: RowScalars, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Each row's weighted sum of columns, the weights being derivatives of the loss by similarities.

    The ``lse`` in the scalars is that over all columns of the batch; ``scale`` (0-d) and ``dtype`` are the result's.

    Returns:
        (N, D) scale · Σ_j (g_ij + g_ji) z_j over the columns, where g_ij is the derivative of the loss by s_ij, and
        (N,) float64, its inner products with the rows.
    """
    pairs = _sort_pairs(contrast)
    weighted = _weighted_columns(pairs, row_scalars.of(pairs.rows.order), column_scalars.of(pairs.columns.order))
    weighted *= scale * contrast.temperature.sqrt()
    rows = contrast.rows
    result = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    products = torch.empty_like(rows[:, 0], dtype=torch.float64)
    for block in pairs.rows.blocks:
        order = pairs.rows.order[block]
        result[order] = weighted[block].to(dtype)
        products[order] = torch.linalg.vecdot(rows[order], weighted[block]).double()
    return result, products


def _sort_pairs(contrast: Contrast) -> Pairs:
    rows, row_keys, columns, column_keys, relations, temperature, active = contrast
    row_side = column_side = _sort_rows(rows, row_keys, len(relations), temperature)
    if columns is not rows:
        column_side = _sort_rows(columns, column_keys, len(relations), temperature)
    linking = [key for keys in (row_keys, column_keys) for key in (keys.identity, keys.group) if key is not None]
    return Pairs(row_side, column_side, relations, active, 1 + max(int(key.max()) for key in linking))


def _sort_rows(embeddings: Tensor, keys: Keys, sets: int, temperature: Tensor) -> SortedRows:
    order = sort_order(keys)
    keys = keys.of(order)
    rows = len(order)
    blocks = [slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK)]
    sets_in_block = torch.zeros(len(blocks), sets, dtype=torch.bool, device=order.device)
    sets_in_block[torch.arange(rows, device=order.device) // BLOCK, keys.candidate_set] = True
    # Scaling both factors alike gives s_ij and s_ji the same bits: a softmax then fits its denominator.
    return SortedRows(order, embeddings[order] / temperature.sqrt(), keys, blocks, sets_in_block)


def _log_sums(pairs: Pairs) -> tuple[Tensor, Tensor]:
    rows, columns = pairs.rows.embeddings, pairs.columns.embeddings
    sums, positive = rows.new_zeros(2, len(rows)), rows.new_zeros(2, len(rows), dtype=torch.float64)
    for left, right, parts, mirrored in _tiles(pairs):
        s = rows[left] @ columns[right].T
        _add_positives(positive, s, left, right, parts, mirrored)
        e = s.exp_()
        for part in parts:
            terms = e * part.members if isinstance(part.members, Tensor) else e
            sums[part.relation, left] += terms.sum(1)
            if mirrored:
                sums[part.relation, right] += terms.sum(0)
    return sums.double().log_(), positive


def _log_sums_wide(pairs: Pairs) -> tuple[Tensor, Tensor]:
    rows, columns = pairs.rows.embeddings, pairs.columns.embeddings
    lse = rows.new_full((2, len(rows)), -torch.inf, dtype=torch.float64)
    positive = torch.zeros_like(lse)
    for left, right, parts, mirrored in _tiles(pairs):
        s = (rows[left] @ columns[right].T).double()
        _add_positives(positive, s, left, right, parts, mirrored)
        for part in parts:
            terms = s.masked_fill(part.members == 0, -torch.inf) if isinstance(part.members, Tensor) else s
            lse[part.relation, left] = torch.logaddexp(lse[part.relation, left], terms.logsumexp(1))
            if mirrored:
                lse[part.relation, right] = torch.logaddexp(lse[part.relation, right], terms.logsumexp(0))
    return lse, positive


def _add_positives(positive: Tensor, s: Tensor, left: slice, right: slice, parts: list[Part], mirrored: bool) -> None:
    for part in parts:
        if part.positives is not False:
            terms = s * part.positives if isinstance(part.positives, Tensor) else s
            positive[part.relation, left] += terms.sum(1)
            if mirrored:
                positive[part.relation, right] += terms.sum(0)


def _weighted_columns(pairs: Pairs, row_scalars: RowScalars, column_scalars: RowScalars) -> Tensor:
    rows, columns = pairs.rows.embeddings, pairs.columns.embeddings
    result = torch.zeros_like(rows)
    unshifted = _is_unshifted(pairs)
    row_scale, column_scale = (
        torch.where(scalars.share > 0, scalars.share * torch.exp(-scalars.lse), 0).to(rows.dtype)
        for scalars in (row_scalars, column_scalars)
    )
    for left, right, parts, mirrored in _tiles(pairs):
        s = rows[left] @ columns[right].T
        if unshifted:
            factors = [
                _pair_sum(row_scale[part.relation, left], column_scale[part.relation, right], part.members)
                for part in parts
            ]
            weight = s.exp_().mul_(factors[0] if len(factors) == 1 else factors[0].add_(factors[1]))
        else:
            weight = _softmax_wide(s.double(), row_scalars.of(left), column_scalars.of(right), parts).to(rows.dtype)
        for part in parts:
            if part.positives is not False:
                pull = row_scalars.pull[part.relation, left], column_scalars.pull[part.relation, right]
                weight -= _pair_sum(*pull, part.positives)
        result[left].addmm_(weight, columns[right])
        if mirrored:
            result[right].addmm_(weight.T, rows[left])
    return result


def _pair_sum(of_rows: Tensor, of_columns: Tensor, mask: Tensor | bool) -> Tensor:
    """What pairs of a row and a column have together, over one or both relations; 0 outside of the mask."""
    total = of_rows.sum(0)[:, None] + of_columns.sum(0)
    return total.mul_(mask) if isinstance(mask, Tensor) else total


def _softmax_wide(s: Tensor, rows: RowScalars, columns: RowScalars, parts: list[Part]) -> Tensor:
    """Σ_r share_i exp(s_ij − lse_i) + share_j exp(s_ij − lse_j): no exponent of a member pair is above 0."""
    total = torch.zeros_like(s)
    for part in parts:
        for r in range(2)[part.relation]:
            terms = rows.share[r, :, None] * torch.exp(s - rows.lse[r, :, None])
            terms += columns.share[r] * torch.exp(s - columns.lse[r])
            # A pair that is no member may overflow: it is left out, as inf times 0 would be no number.
            total += torch.where(part.members > 0, terms, 0) if isinstance(part.members, Tensor) else terms
    return total


def _is_unshifted(pairs: Pairs) -> bool:
    row, column = (part.embeddings.square().sum(1).max() for part in (pairs.rows, pairs.columns))
    return bool((row * column).sqrt() < UNSHIFTED_LIMIT)


def _tiles(pairs: Pairs) -> Iterator[tuple[slice, slice, list[Part], bool]]:
    """Tiles that take part in an active relation: rows, columns, parts, and whether the tile's mirror image counts.

    Of a batch with itself only tiles on and above the diagonal come, those above it for their mirror image, too.
    """
    symmetric = pairs.columns is pairs.rows
    for number, left in enumerate(pairs.rows.blocks):
        first = number if symmetric else 0
        for right, uniform in zip(pairs.columns.blocks[first:], _uniform_relations(pairs, number, first), strict=True):
            mirrored = symmetric and left != right
            if not uniform:
                yield left, right, _masked_parts(pairs, left, right), mirrored
            elif uniform & pairs.active:
                yield left, right, [Part(MEMBERS[uniform & pairs.active], True, uniform == SAME)], mirrored


def _uniform_relations(pairs: Pairs, number: int, first: int) -> list[int]:
    """The relation of a block of rows with blocks of columns from ``first`` on; 0 where pairs of the tile differ."""
    rows, columns = pairs.rows, pairs.columns
    if rows is columns and first == len(rows.blocks) - 1:
        return [0]  # the last on the diagonal, where rows meet themselves
    relations, here = pairs.relations[rows.sets_in_block[number]], columns.sets_in_block[first:]
    lowest = torch.where(here, relations.amin(0), DIFF).amin(1)
    highest = torch.where(here, relations.amax(0), 0).amax(1)
    uniform = torch.where(lowest == highest, lowest, 0)
    start = columns.blocks[first].start
    for row_key, column_key in ((rows.keys.identity, columns.keys.identity), (rows.keys.group, columns.keys.group)):
        if row_key is not None and column_key is not None:
            in_block = torch.zeros(pairs.keys, dtype=torch.bool, device=row_key.device)
            in_block[row_key[rows.blocks[number]]] = True
            uniform[in_block[column_key[start:]].nonzero()[:, 0] // BLOCK] = 0
    return uniform.tolist()


def _masked_parts(pairs: Pairs, left: slice, right: slice) -> list[Part]:
    rows, columns = pairs.rows.keys.of(left), pairs.columns.keys.of(right)
    relation = pairs.relations.index_select(1, columns.candidate_set).index_select(0, rows.candidate_set)
    # Bytes of 0 and 1: PyTorch combines them, and multiplies by them, many times faster than it compares or selects.
    twin = _equal(rows.identity, columns.identity)
    linked = twin if rows.group is None or columns.group is None else twin | _equal(rows.group, columns.group)
    apart, not_same, label = linked ^ 1, relation & 1, relation >> 1
    same = label & (not_same ^ 1)
    parts = []
    for bit, members, positives in ((0b01, twin | apart & not_same, twin), (0b10, same | apart & label, same)):
        if bit & pairs.active:
            for mask in (members, positives):
                if pairs.columns is not pairs.rows:
                    mask &= _equal(rows.position, columns.position) ^ 1
                elif left == right:
                    mask.fill_diagonal_(0)
            parts.append(Part(MEMBERS[bit], members, positives))
    return parts


def _equal(of_rows: Tensor, of_columns: Tensor) -> Tensor:
    return (of_rows.int()[:, None] == of_columns.int()).view(torch.uint8)
