"""What a row's positives add up to, without a look at pairs: rows of one key are all each other's positives.

Their similarities are Σ_p z_i·z_p = z_i·(Σ_p z_p), and the inner sum is one for each key: N·D numbers, not N².
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mixcl_dist.kernels.relations import SAME, Keys

CHUNK = 4096  #: rows that are held in float64 at a time


class Positives(NamedTuple):
    """Of one relation, sums over the columns of each key, in float64: added one by one in float32, a class of 10⁵ rows
    would lose two digits. The last key is that of rows without positives."""

    row_key: Tensor  #: (N,) int64
    itself: Tensor  #: (N,) bool, whether the row is among its columns of the same key
    embeddings: Tensor  #: (K, D), Σ z_p
    pulled: Tensor  #: (K, D), Σ pull_p z_p

    def similarity(self, rows: Tensor) -> Tensor:
        """(N,) Σ_p z_i·z_p over the positives of each of the (N, D) rows."""
        return torch.cat([(z * (sums - own * z)).sum(1) for z, sums, _, own, _ in self._chunks(rows)])

    def pull(self, rows: Tensor, pull: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of Σ_p (pull_i + pull_p) z_p over the positives of each row, from (N, D) rows and their (N,) pull."""
        for z, sums, pulled, own, chunk in self._chunks(rows):
            mine = pull[chunk, None]
            yield chunk, mine * sums + pulled - 2 * own * mine * z

    def _chunks(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, slice]]:
        for start in range(0, len(rows), CHUNK):
            chunk = slice(start, start + CHUNK)
            key = self.row_key[chunk]
            yield rows[chunk].double(), self.embeddings[key], self.pulled[key], self.itself[chunk, None], chunk


def positives(
    relation: int, row_keys: Keys, columns: Tensor, column_keys: Keys, relations: Tensor, pull: Tensor | None = None
) -> Positives:
    """Positives of relation 0, identity, or 1, label.

    Args:
        columns: (M, D) embeddings.
        relations: (S, S) uint8.
        pull: (M,) weights for ``pulled``; none leaves it 0.
    """
    if relation == 0:
        row_key, column_key = row_keys.identity, column_keys.identity
    else:
        single = relations.diagonal() == SAME
        row_key, column_key = (
            torch.where(single[keys.candidate_set], keys.candidate_set, -1) for keys in (row_keys, column_keys)
        )
    if int(column_key.max()) >= len(row_key):  # of many processes: only the keys of these rows need a sum
        column_key, row_key = _renumber(column_key, row_key)
    nobody = int(max(row_key.max(), column_key.max())) + 1
    row_key, column_key = (torch.where(key < 0, nobody, key) for key in (row_key, column_key))
    itself = torch.isin(row_keys.position, column_keys.position) & (row_key != nobody)
    sums = columns.new_zeros(nobody + 1, columns.shape[1], dtype=torch.float64)
    pulled = sums if pull is None else torch.zeros_like(sums)
    for start in range(0, len(columns), CHUNK):
        chunk = slice(start, start + CHUNK)
        z = columns[chunk].double()
        sums.index_add_(0, column_key[chunk], z)
        if pull is not None:
            pulled.index_add_(0, column_key[chunk], z * pull[chunk, None])
    sums[nobody] = pulled[nobody] = 0
    return Positives(row_key, itself, sums, pulled)


def _renumber(column_key: Tensor, row_key: Tensor) -> tuple[Tensor, Tensor]:
    """Both keys as numbers below the number of rows; −1 for columns whose key no row has."""
    of_rows, numbers = torch.unique(row_key, return_inverse=True)
    place = torch.searchsorted(of_rows, column_key).clamp(max=len(of_rows) - 1)
    numbers = torch.where(row_key < 0, -1, numbers)
    return torch.where((of_rows[place] == column_key) & (column_key >= 0), place, -1), numbers
