"""Draws: a patch's numbers are those of its seed, slot and number of the draw, and of nothing beside it."""

from __future__ import annotations

import torch

from mixcl_dist.pretraining.draws import Draws


def test_a_patch_is_given_the_same_numbers_in_any_company():
    together, alone = Draws(3, [5, 9, 1000]), Draws(3, [9])
    for _ in range(2):
        assert torch.equal(together.uniform(4, 2)[1], alone.uniform(4, 2)[0])
        assert torch.equal(together.normal(3)[1], alone.normal(3)[0])


def test_parts_follow_one_another_and_differ():
    whole = Draws(3, [5, 9]).uniform(6, parts=2)
    assert whole.shape == (4, 6)
    assert torch.equal(whole[2:][1], Draws(3, [9]).uniform(6, parts=2)[1])
    assert not torch.equal(whole[:2], whole[2:])


def test_another_seed_slot_or_draw_gives_other_numbers():
    draws = Draws(3, [5, 9])
    first, second = draws.uniform(64), draws.uniform(64)
    other = Draws(4, [5, 9]).uniform(64)
    rows = torch.cat([first, second, other])
    assert len(torch.unique(rows)) == rows.numel()
    assert rows.min() > 0 and rows.max() < 1
