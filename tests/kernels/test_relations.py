from __future__ import annotations

import torch

from mixcl_dist.kernels.relations import DIFF, OPEN, SAME, partners, relation_table, single_class, sort_order

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


def test_single_class_is_known_only_of_sets_with_one_member():
    candidate_set = torch.tensor([LIVER, ANY, SPLEEN, NOT_LIVER])
    assert single_class(SETS, candidate_set).tolist() == [0, -1, 1, -1]


def test_partners_share_a_number_and_negative_keys_stand_alone():
    number = partners(torch.tensor([9, -1, 4, 9, -1, -3]))
    assert number[0] == number[3]
    assert sorted(number.unique().tolist()) == [0, 1, 2, 3, 4]


def test_rows_are_sorted_by_set_then_identity_and_ties_keep_their_order():
    candidate_set, identity = torch.tensor([1, 0, 1, 0, 1]), torch.tensor([5, 7, 2, 7, 5])
    assert sort_order(candidate_set, identity).tolist() == [1, 3, 2, 0, 4]
