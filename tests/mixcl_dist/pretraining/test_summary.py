"""What a pre-training is said to have learnt, and by what."""

from __future__ import annotations

import pytest
import torch

from mixcl_dist.kernels import mixed_contrastive_loss
from mixcl_dist.pretraining.summary import (
    came_of_plan,
    chance_levels,
    label_anchors,
    label_term_is_off,
    learnt,
    terms_on,
    told,
)

CONFIG = {"engine": {"accumulation_steps": 2}, "pretrain": {"batch_size": 12}, "rows": {"per_view_pair": 5}}


def test_chance_is_the_loss_of_rows_that_are_all_alike():
    patches, points = 12 // 2, 5
    for rows, term in ((patches * points, "voxel_identity"), (patches, "crop_identity")):
        out = mixed_contrastive_loss(
            torch.nn.functional.normalize(torch.ones(2 * rows, 4)),
            torch.arange(rows).repeat(2),
            torch.zeros(2 * rows, dtype=torch.int64),
            torch.tensor([[True, True]]),
        )
        assert chance_levels({}, CONFIG)[term] == pytest.approx(float(out.identity_loss), rel=1e-5)


@pytest.mark.parametrize("config", [{}, {"engine": {}}, CONFIG | {"pretrain": {"batch_size": "x"}}])
def test_chance_is_not_guessed(config):
    assert chance_levels({}, config) == {}


def test_of_many_steps_the_first_and_last_tenths_are_compared():
    steps = [{"step": step, "reconstruction": float(step)} for step in range(1, 31)]
    assert learnt(steps) == ["reconstruction error 2 → 29"]


def test_a_label_term_without_anchors_is_off_and_one_without_weight_is_not_there():
    off = [{"step": 1, "reconstruction": 0.1, "voxel_label_anchors": 0.0}]
    assert label_term_is_off(off) and terms_on(off) == ["reconstruction"]
    without = [{"step": 1, "reconstruction": 0.1}]
    assert not label_term_is_off(without) and label_anchors(without) is None
    assert told({}, []) == "Nothing has been logged yet."


def test_what_was_planned_is_held_against_what_was_logged_after_the_start():
    plan = {"gpus": 4, "patches_per_s": {"expected": 10.0, "low": 9.0, "high": 11.0}}
    slow_start = {"step": 10, "samples": 80, "seconds": 100.0}
    steps = [slow_start, {"step": 20, "samples": 160, "seconds": 8.0}, {"step": 30, "samples": 240, "seconds": 12.0}]
    rate, hours = came_of_plan({"plan": plan}, steps)
    assert "on 4 GPUs or processes; measured 8 over 160 patches, -20%: outside of what was planned" in rate
    assert hours == "These took 20 s, for which 16 s were planned."
    assert "as planned" in came_of_plan({"plan": plan}, [slow_start, {"step": 20, "samples": 160, "seconds": 8.0}])[0]
    assert came_of_plan({}, steps) == came_of_plan({"plan": plan}, [slow_start]) == []
