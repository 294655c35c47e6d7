"""The learning rate rises, then falls along half a cosine."""

from __future__ import annotations

import itertools
import math

import pytest

from mixcl_dist.schedule import warmup_cosine


def test_it_rises_to_the_highest_and_ends_at_the_final_share():
    factor = warmup_cosine(100, warmup_fraction=0.1, final_fraction=0.02)
    course = [factor(step) for step in range(101)]
    assert course[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert course[10] == 1 == max(course)
    assert all(earlier >= later for earlier, later in itertools.pairwise(course[10:]))
    assert course[55] == pytest.approx(0.51)  # amid the cosine: halfway between 1 and 0.02
    assert course[100] == pytest.approx(0.02)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_a_learning_rate(steps):
    factor = warmup_cosine(steps, warmup_fraction=0.05, final_fraction=0.0)
    assert all(0 < factor(step) <= 1 and math.isfinite(factor(step)) for step in range(steps))
