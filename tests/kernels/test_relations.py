from __future__ import annotations

import torch

from mixcl_dist.kernels.relations import (
    DIFF,
    OPEN,
    SAME,
    Keys,
    number,
    relation_table,
    row_keys,
    sort_order,
)

LIVER, SPLEEN, NOT_LIVER, ANY = range(4)
SETS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)


def test_relation_of_every_two_sets():
    assert relation_table(SETS).tolist() == [
        [SAME, DIFF, DIFF, OPEN],
        [DIFF, SAME, OPEN, OPEN],
        [DIFF, OPEN, OPEN, OPEN],
        [OPEN, OPEN, OPEN, OPEN],
    ]


def test_equal_sets_of_several_classes_do_not_attract():
    assert relation_table(SETS[[ANY, ANY]]).tolist() == [[OPEN, OPEN], [OPEN, OPEN]]


def test_positives_are_twins_and_rows_of_the_same_single_class():
    identity, candidate_set = torch.tensor([4, 4, -1, 4, -1]), torch.tensor([LIVER, ANY, LIVER, SPLEEN, NOT_LIVER])
    assert row_keys(identity, candidate_set, SETS, None)[2].tolist() == [[2, 2, 0, 2, 0], [1, 0, 1, 0, 0]]


def test_rows_of_one_key_share_a_number_and_negative_keys_stand_alone():
    numbers, members = number(torch.tensor([9, -1, 4, 9, -1, -3]))
    assert numbers[0] == numbers[3]
    assert sorted(numbers.unique().tolist()) == [0, 1, 2, 3, 4]
    assert members.tolist() == [2, 1, 1, 2, 1, 1]


def test_equal_sets_become_one_and_sets_without_rows_come_last():
    table = SETS[[ANY, LIVER, SPLEEN, LIVER]]
    keys, relations, positives = row_keys(torch.arange(3), torch.tensor([3, 2, 1]), table, None)
    assert keys.candidate_set.tolist() == [0, 1, 0]
    assert relations[:2, :2].tolist() == [[SAME, DIFF], [DIFF, SAME]]
    assert positives[1].tolist() == [1, 0, 1]


def test_rows_are_sorted_by_set_then_identity_and_ties_keep_their_order():
    candidate_set, identity = torch.tensor([1, 0, 1, 0, 1]), torch.tensor([5, 7, 2, 7, 5])
    assert sort_order(Keys(identity, None, candidate_set, torch.arange(5))).tolist() == [1, 3, 2, 0, 4]
