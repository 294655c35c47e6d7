"""How rows stand to each other: the relation of two candidate sets, partners, and a good order of rows."""

from __future__ import annotations

import torch
from torch import Tensor

#: The relation of two candidate sets. The bits say in which log-sum-exp such a pair takes part, unless a
#: shared identity or group says otherwise: bit 0 the identity relation's, bit 1 the label relation's.
OPEN, SAME, DIFF = 0b01, 0b10, 0b11


def relation_table(set_table: Tensor) -> Tensor:
    """Relation of every two candidate sets.

    Args:
        set_table: (S, C) bool, the classes that a row of each set may belong to.

    Returns:
        (S, S) uint8: ``SAME`` where both sets are the same single class, ``DIFF`` where they have no class
        in common, ``OPEN`` otherwise.
    """
    classes = set_table.to(torch.float32)
    common = classes @ classes.T
    single = set_table.sum(1) == 1
    relation = torch.where(common == 0, DIFF, OPEN)
    relation[single[:, None] & single[None, :] & (common > 0)] = SAME
    return relation.to(torch.uint8)


def single_class(set_table: Tensor, candidate_set: Tensor) -> Tensor:
    """(N,) int64: the class of a row that can be of one class only, −1 for any other row."""
    of_set = torch.where(set_table.sum(1) == 1, set_table.to(torch.uint8).argmax(1), -1)
    return of_set[candidate_set]


def partners(key: Tensor) -> Tensor:
    """Renumber keys from 0 such that rows are partners exactly where the new numbers are equal.

    Args:
        key: (N,) integers; rows of one key ≥ 0 are partners, a row with a negative key stands alone.

    Returns:
        (N,) int64 in [0, N).
    """
    alone = -1 - torch.arange(len(key), device=key.device)
    return torch.unique(torch.where(key >= 0, key, alone), return_inverse=True)[1]


def sort_order(candidate_set: Tensor, identity: Tensor) -> Tensor:
    """(N,) int64: the stable order of rows by candidate set, then identity.

    In this order most tiles of the similarity matrix hold one relation only, and twins of one set are
    neighbours.
    """
    by_identity = torch.argsort(identity, stable=True)
    return by_identity[torch.argsort(candidate_set[by_identity], stable=True)]
