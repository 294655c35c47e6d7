"""Intervals cover what they promise, Holm is the closed test, and steps are counted on curves made by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from mixcl_dist.studies import statistics
from mixcl_dist.studies.statistics import (
    EFFECT_VARIANCE,
    Difference,
    Interval,
    holm,
    is_decided,
    mean_difference,
    median_with_unreached,
    plateau,
    sequence_half_width,
    steps_to,
    t_interval,
    t_sequence,
)

NAN = float("nan")


def test_the_mean_is_over_cases_then_classes_then_seeds():
    differences = np.array([[[0.1, 0.4], [0.3, NAN]], [[0.0, 0.2], [0.2, NAN]]])
    assert mean_difference(differences, 100).mean == pytest.approx(((0.2 + 0.4) / 2 + (0.1 + 0.2) / 2) / 2)


def test_of_seeds_or_cases_alone_the_interval_is_students():
    """All seeds or all cases alike: what is left is the t-test of the others."""
    few = np.random.default_rng(0).normal(0.03, 0.1, size=4)
    alone = t_interval(few.tolist())
    seeds = mean_difference(np.repeat(few[:, None, None], 9, axis=1), 20_000)
    assert (seeds.low, seeds.high) == pytest.approx((alone.low, alone.high), abs=0.02 * (alone.high - alone.low))
    assert seeds.p == pytest.approx(stats.ttest_1samp(few, 0).pvalue, rel=0.05)
    cases = mean_difference(np.repeat(few[None, :, None], 9, axis=0), 20_000)
    assert (cases.low, cases.high) == pytest.approx((alone.low, alone.high), abs=0.02 * (alone.high - alone.low))


def test_the_error_of_a_class_that_few_cases_have_is_that_of_scipys_bootstrap():
    """Seeds alike: over cases, a mean of class means is no mean of cases; many cases, where one fewer is no matter."""
    one = np.random.default_rng(1).normal(0.03, 0.1, size=(60, 2))
    one[15:, 1] = NAN
    found = mean_difference(np.repeat(one[None], 2, axis=0), 5000)
    error = (found.high - found.low) / 2 / stats.t.ppf(0.975, 1)

    def mean(rows, axis):
        return np.nanmean(np.nanmean(one[rows], axis=axis - 1 if axis < 0 else axis), axis=-1)

    expected = stats.bootstrap((np.arange(60),), mean, n_resamples=5000, rng=1).standard_error
    assert error == pytest.approx(expected, rel=0.06)


def test_a_resample_is_the_mean_over_what_was_drawn():
    """The vectorised mean against one that repeats every drawn seed and case."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 9, 3))
    values[:, rng.random((9, 3)) < 0.3] = NAN
    seeds, cases = rng.integers(0, 4, 4), rng.integers(0, 9, 9)
    drawn = values[seeds][:, cases]
    expected = np.mean([np.nanmean(np.nanmean(each, axis=0)) for each in drawn])
    counts = (np.bincount(seeds, minlength=4)[None], np.bincount(cases, minlength=9)[None])
    assert statistics._means(values, *counts)[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("seeds", "case_sd", "at_most"), [(2, 0, 1), (3, 0, 1), (5, 0, 0.97), (10, 0, 0.97), (10, 0.06, 1)]
)
def test_ninety_five_of_a_hundred_intervals_hold_the_truth(seeds, case_sd, at_most):
    """Seeds and cases each with an effect of their own, as the table has them, and p of the truth is below 0.05 in five
    of a hundred. Of two or three seeds, or where cases differ as much as seeds, Student's intervals are too wide."""
    rng = np.random.default_rng(2)
    found = []
    for _ in range(600):
        seed, case = rng.normal(0, 0.06, (seeds, 1, 1)), rng.normal(0, case_sd, (1, 12, 1))
        found.append(mean_difference(seed + case + rng.normal(0, 0.03, (seeds, 12, 1)), 200))
    held = np.mean([each.low <= 0 <= each.high for each in found])
    assert 0.93 <= held <= at_most
    assert np.mean([each.p < 0.05 for each in found]) == pytest.approx(1 - held)


def test_seeds_alone_would_be_too_sure():
    rng = np.random.default_rng(3)
    values = rng.normal(0, 0.2, (1, 8, 1)) + rng.normal(0, 0.001, (10, 8, 1))
    both = mean_difference(values, 2000)
    over_seeds = t_interval(values.mean(axis=(1, 2)).tolist())
    assert both.high - both.low > 10 * (over_seeds.high - over_seeds.low)


def test_p_is_below_five_per_cent_where_the_interval_leaves_out_zero():
    rng = np.random.default_rng(4)
    found = [mean_difference(rng.normal(rng.normal(0, 0.5), 1, (5, 9, 2)), 100) for _ in range(100)]
    assert 20 < sum(each.p < 0.05 for each in found) < 80
    assert all((each.p < 0.05) == each.excludes_zero for each in found)


def test_arms_that_do_not_differ_have_p_1():
    assert mean_difference(np.zeros((3, 4, 2)), 100) == Difference(3, 4, 0, 0, 0, 1)


def test_the_same_values_have_the_same_interval():
    values = np.random.default_rng(5).normal(size=(3, 5, 2))
    assert mean_difference(values, 500) == mean_difference(values, 500)


def test_one_seed_or_one_case_has_no_interval():
    assert mean_difference(np.full((1, 5, 2), 0.1), 100) == Difference(1, 5, pytest.approx(0.1), None, None, None)
    assert mean_difference(np.full((5, 1, 2), 0.1), 100).low is None
    assert mean_difference(np.full((2, 3, 2), NAN), 100) == Difference(0, 0, None, None, None, None)


def test_a_case_or_seed_without_scores_does_not_count():
    values = np.full((3, 4, 2), 0.1)
    values[1], values[:, 2] = NAN, NAN
    found = mean_difference(values, 100)
    assert (found.seeds, found.cases) == (2, 3) and found.mean == pytest.approx(0.1)


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.5], [], [0.02, 0.02, 0.9], [0.3, 0.2, 0.6, 0.0]])
def test_holm_is_the_closed_test_of_bonferroni(p):
    """A hypothesis is rejected where Bonferroni rejects every intersection that it is part of."""
    index = range(len(p))
    subsets = [s for size in range(1, len(p) + 1) for s in itertools.combinations(index, size)]
    closed = [max(min(1.0, len(s) * min(p[i] for i in s)) for s in subsets if one in s) for one in index]
    assert holm(p) == pytest.approx(closed)


def test_steps_to_a_dice_are_read_from_the_curve():
    curve = [(100, 0.2), (200, 0.5), (300, 0.45), (400, 0.6)]
    assert [steps_to(curve, dice) for dice in (0.1, 0.5, 0.7)] == [100, 200, None]
    assert steps_to(curve, 0.3) == pytest.approx(100 + 100 / 3)  # a third of the way from 0.2 to 0.5
    assert steps_to(curve, 0.55) == pytest.approx(300 + 100 * 2 / 3)  # after the dip, not before it
    assert plateau(curve) == pytest.approx((0.45 + 0.6) / 2)
    assert plateau([]) is None and steps_to([], 0.1) is None


def test_what_was_not_reached_counts_as_longer_than_anything():
    assert median_with_unreached([0.2, None, 0.4]) == 0.4
    assert median_with_unreached([0.2, None]) is None and median_with_unreached([]) is None


def looked_at(values, half_width):
    """Of each row of values, whether an interval about its running mean excludes zero at any look."""
    counts = np.arange(1, values.shape[1] + 1)
    means = np.cumsum(values, axis=1) / counts
    deviations = np.sqrt(np.maximum(np.cumsum(values**2, axis=1) - counts * means**2, 0)[:, 1:] / (counts[1:] - 1))
    halves = np.array([half_width(int(n), 1.0) for n in counts[1:]]) * deviations
    return (np.abs(means[:, 1:]) > halves).any(axis=1)


@pytest.mark.parametrize("draw", ["normal", "laplace", "uniform"])
def test_whoever_looks_after_every_seed_is_told_of_a_difference_that_is_none_in_5_of_100_comparisons_at_most(draw):
    rng = np.random.default_rng(1)
    sizes = {"normal": (0, 1), "laplace": (0, 1), "uniform": (-1, 1)}
    null = getattr(rng, draw)(*sizes[draw], size=(4000, 40))
    assert looked_at(null, sequence_half_width).mean() <= 0.05
    fixed = looked_at(null, lambda n, sd: sd * stats.t.ppf(0.975, n - 1) / n**0.5)
    assert fixed.mean() > 0.2, "the interval of one look is no help here"


def test_a_difference_that_is_there_is_found_in_few_seeds():
    rng = np.random.default_rng(2)
    assert looked_at(rng.normal(2, 1, size=(2000, 10)), sequence_half_width).mean() > 0.9


def test_an_interval_of_the_sequence_is_where_the_mixture_does_not_reject():
    values = [0.03, 0.01, 0.04, 0.02, 0.035]
    found = t_sequence(values)
    n, spread = len(values), 1 + len(values) * EFFECT_VARIANCE
    for edge in (found.low, found.high):
        t = (np.mean(values) - edge) / (np.std(values, ddof=1) / n**0.5)
        ratio = stats.t.pdf(t / spread**0.5, n - 1) / spread**0.5 / stats.t.pdf(t, n - 1)
        assert ratio == pytest.approx(20)
    assert t_sequence(values[:3]).low is None and t_sequence([0.1]).low is None


def test_a_comparison_is_decided_by_its_sign_or_by_being_small():
    assert is_decided(Interval(9, 0.03, 0.01, 0.01, 0.05), 0.0)
    assert not is_decided(Interval(9, 0.0, 0.01, -0.01, 0.01), 0.01)
    assert is_decided(Interval(9, 0.0, 0.01, -0.01, 0.01), 0.02)
    assert not is_decided(Interval(2, 0.3, 0.01, None, None), 0.02)
