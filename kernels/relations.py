"""How rows stand to each other: the relation of two candidate sets, linked rows, and a good order of rows.

Nothing here waits for the device that holds the tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: The relation of two candidate sets. The bits say in which log-sum-exp such a pair takes part, unless a
#: shared identity or group says otherwise: bit 0 the identity relation's, bit 1 the label relation's.
OPEN, SAME, DIFF = 0b01, 0b10, 0b11


class Keys(NamedTuple):
    """What is known of rows, as integers that are equal exactly where rows belong together."""

    identity: Tensor  #: (N,) int64, equal for a row and its twins only
    group: Tensor | None  #: (N,) int64, equal for rows of one group only
    candidate_set: Tensor  #: (N,) int64, index into the relation table; equal sets have one index
    position: Tensor  #: (N,) int64, the row's own number

    def of(self, rows: slice | Tensor) -> Keys:
        group = None if self.group is None else self.group[rows]
        return Keys(self.identity[rows], group, self.candidate_set[rows], self.position[rows])


class Contrast(NamedTuple):
    """Rows, and the columns that they are contrasted with; both the very same tensor where a batch meets itself."""

    rows: Tensor  #: (N, D)
    row_keys: Keys
    columns: Tensor  #: (M, D) of the same dtype
    column_keys: Keys
    relations: Tensor  #: (S, S) uint8, see :func:`relation_table`
    temperature: Tensor  #: 0-d
    active: int  #: bits of the relations that are switched on, 0b01 identity and 0b10 label


def row_keys(
    identity: Tensor, candidate_set: Tensor, set_table: Tensor, group: Tensor | None
) -> tuple[Keys, Tensor, Tensor]:
    """Keys of rows as :func:`mixcl_dist.kernels.mixed_contrastive_loss` takes them, and the relations of their sets.

    Equal sets become one, and sets that occur come before those that do not.

    Returns:
        Keys, (S, S) uint8 as of :func:`relation_table`, and (2, N) int64 how many positives each row has, of the
        identity and of the label relation.
    """
    if set_table.device.type == "cpu":  # elsewhere one would have to wait for their number
        occurring, candidate_set = torch.unique(candidate_set, return_inverse=True)
        set_table = set_table[occurring]
    common, size = _common_classes(set_table)
    candidate_set = _first_equal_set(common, size)[candidate_set]
    rows_of_set = torch.zeros_like(size, dtype=torch.int64).index_add_(0, candidate_set, torch.ones_like(candidate_set))
    order, place = occurring_first(candidate_set, len(size))
    numbers, members = number(identity)
    same_class = torch.where(size == 1, rows_of_set - 1, 0)[candidate_set]
    keys = Keys(
        numbers,
        None if group is None else number(group)[0],
        place[candidate_set],
        torch.arange(len(identity), device=identity.device),
    )
    relations = _relations(common, size)[order][:, order].contiguous()
    return keys, relations, torch.stack([members - 1, same_class])


def occurring_first(candidate_set: Tensor, sets: int) -> tuple[Tensor, Tensor]:
    """(S,) int64 the order of sets in which those that rows have come first, and the place of each set in it."""
    absent = torch.ones(sets, dtype=torch.uint8, device=candidate_set.device).index_fill(0, candidate_set, 0)
    order = torch.argsort(absent, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(sets, device=order.device)
    return order, place


def relation_table(set_table: Tensor) -> Tensor:
    """Relation of every two candidate sets.

    Args:
        set_table: (S, C) bool, the classes that a row of each set may belong to.

    Returns:
        (S, S) uint8: ``SAME`` where both sets are the same single class, ``DIFF`` where they have no class
        in common, ``OPEN`` otherwise.
    """
    return _relations(*_common_classes(set_table))


def _common_classes(set_table: Tensor) -> tuple[Tensor, Tensor]:
    """(S, S) the number of classes that two sets share, and (S,) of each set, exact in float32."""
    classes = set_table.to(torch.float32)
    return classes @ classes.T, classes.sum(1)


def _relations(common: Tensor, size: Tensor) -> Tensor:
    single = size == 1
    relation = torch.where(common == 0, DIFF, OPEN)
    relation = torch.where(single[:, None] & single[None, :] & (common > 0), SAME, relation)
    return relation.to(torch.uint8)


def _first_equal_set(common: Tensor, size: Tensor) -> Tensor:
    """(S,) int64: the first set with the same classes as each set."""
    equal = (common == size[:, None]) & (common == size[None, :])
    return equal.to(torch.uint8).argmax(1) if len(size) else equal.new_zeros(0, dtype=torch.int64)


def number(key: Tensor) -> tuple[Tensor, Tensor]:
    """Renumber keys from 0 such that rows belong together exactly where the new numbers are equal.

    Args:
        key: (N,) integers; rows of one key ≥ 0 belong together, a row with a negative key stands alone.

    Returns:
        (N,) int64 in [0, N), and (N,) int64 how many rows have the same number, the row itself included.
    """
    alone = -1 - torch.arange(len(key), device=key.device)
    in_order, order = torch.sort(torch.where(key >= 0, key, alone))
    begins = torch.ones_like(in_order, dtype=torch.bool)
    begins[1:] = in_order[1:] != in_order[:-1]
    numbers = torch.empty_like(order)
    numbers[order] = in_order = begins.cumsum(0) - 1
    members = torch.searchsorted(in_order, numbers, right=True) - torch.searchsorted(in_order, numbers)
    return numbers, members


def sort_order(keys: Keys) -> Tensor:
    """(N,) int64: the stable order of rows by candidate set, then identity.

    In this order most tiles of the similarity matrix hold one relation only, and twins of one set are
    neighbours.
    """
    by_identity = torch.argsort(keys.identity, stable=True)
    return by_identity[torch.argsort(keys.candidate_set[by_identity], stable=True)]
