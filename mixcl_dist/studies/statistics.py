"""How sure a mean of few seeds is, and a mean over seeds and cases; comparing many arms; steps to a Dice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
BOOTSTRAP_SEED = 20_220_304
"""Fixed, so that a table has one interval however often it is reported."""
EFFECT_VARIANCE = 4.0
"""Of the differences, in their standard deviations, for which a confidence sequence is made narrow."""
PLATEAU = 0.25
"""Last share of a training whose mean Dice is its plateau."""


class _Bounded:
    """Has an interval, or None for both its ends."""

    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Interval(_Bounded):
    """Mean of `n` values with its two-sided 95 % Student t-interval; `sd`, `low`, `high` are None below two values."""

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None


def t_interval(values: Sequence[float]) -> Interval:
    """Summarise independent values, e.g. the paired differences of several seeds."""
    n = len(values)
    if n == 0:
        return Interval(0, None, None, None, None)
    mean = fmean(values)
    if n == 1:
        return Interval(1, mean, None, None, None)
    sd = stdev(values)
    half = _half_width(sd / n**0.5, n - 1)
    return Interval(n, mean, sd, mean - half, mean + half)


def _half_width(error: float, freedom: int) -> float:
    """Of Student's interval about a mean with that standard error and degrees of freedom."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error


def t_sequence(values: Sequence[float]) -> Interval:
    """Mean of independent values with its interval of a two-sided 95 % confidence sequence: one may look after every
    value and stop when one likes, and all its intervals together miss the truth in at most 5 of 100 sequences of normal
    values.

    It is where the mixture t-test does not reject: the ratio of Student's t under standardised effects of variance
    `EFFECT_VARIANCE` (closed form: Gönen et al. 2005, doi:10.1198/000313005X55233) to that under none is a martingale,
    as it depends on the scale-free part of the values alone (Lai 1976, doi:10.1214/aos/1176343406; Wang and Ramdas
    2025, arXiv:2310.03722), so it exceeds 20 with probability 1/20 at most (Ville). `low` and `high` are None where
    there are too few values: below four.
    """
    found = t_interval(values)
    if found.sd is None or found.mean is None:
        return found
    half = sequence_half_width(found.n, found.sd)
    bounded = math.isfinite(half)
    return Interval(
        found.n, found.mean, found.sd, found.mean - half if bounded else None, found.mean + half if bounded else None
    )


def sequence_half_width(n: int, sd: float) -> float:
    """Of `t_sequence` after n values of that standard deviation."""
    spread = 1 + n * EFFECT_VARIANCE
    ratio = (math.sqrt(spread) / (1 - CONFIDENCE)) ** (2 / n)
    return sd * math.sqrt((n - 1) / n * (ratio - 1) / (1 - ratio / spread)) if ratio < spread else math.inf


def is_decided(found: Interval, smallest: float) -> bool:
    """Whether an interval tells which arm is better, or that the difference is smaller than anybody cares about."""
    if found.low is None or found.high is None:
        return False
    return found.excludes_zero or (-smallest < found.low and found.high < smallest)


@dataclass(frozen=True)
class Difference(_Bounded):
    """Mean paired difference of two arms with its two-sided 95 % interval over seeds and cases.

    `low`, `high` and `p` (that of no difference, two-sided) are None below two seeds or two cases.
    """

    seeds: int
    cases: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None


def mean_difference(differences: np.ndarray, resamples: int) -> Difference:
    """Of (seeds, cases, classes) differences, NaN where a class is not scored in a case.

    The mean is that of a trial's Dice: over a class's cases, then over classes, then over seeds. Every seed is scored
    on the same cases, so its variance is the sum of two bootstrap variances, of `resamples` resamples of seeds and as
    many of cases. A resample draws one fewer than there are, without which the variance of S seeds would be (S-1)/S of
    what it should be, half at two (McCarthy and Snowden 1985). What is neither of a seed nor of a case is in both; it
    is not subtracted once (as by Cameron, Gelbach and Miller 2011, doi:10.1198/jbes.2010.07136), since of few seeds
    the rest may be negative. A class of which a resample has no case is left out of it.

    Interval and `p` are Student's, with one degree of freedom fewer than there are seeds (or cases, if they are fewer):
    percentiles of resamples of two seeds would hold the truth in 63 of 100 tables, not in 95.
    """
    scored = ~np.isnan(differences)
    seeds = int(scored.any(axis=(1, 2)).sum())
    cases = int(scored.any(axis=(0, 2)).sum())
    if not seeds:
        return Difference(0, 0, None, None, None, None)
    kept = differences[scored.any(axis=(1, 2))][:, scored.any(axis=(0, 2))]
    mean = float(_means(kept, np.ones((1, seeds)), np.ones((1, cases)))[0])
    if seeds == 1 or cases == 1:
        return Difference(seeds, cases, mean, None, None, None)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = [rng.multinomial(count - 1, np.full(count, 1 / count), size=resamples) for count in (seeds, cases)]
    over_seeds = _means(kept, drawn[0], np.ones((1, cases)))
    over_cases = _means(kept, np.ones((1, seeds)), drawn[1])
    error = float(np.sqrt(np.mean((over_seeds - mean) ** 2) + np.mean((over_cases - mean) ** 2)))
    freedom = min(seeds, cases) - 1
    half = _half_width(error, freedom)
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return Difference(seeds, cases, mean, mean - half, mean + half, p)


def _means(values: np.ndarray, seed_counts: np.ndarray, case_counts: np.ndarray) -> np.ndarray:
    """Mean of each of B resamples; `values` is (S, C, K), counts are (B or 1, S) and (B or 1, C) times drawn."""
    scored = ~np.isnan(values)
    total = np.einsum("bc,sck->bsk", case_counts, np.where(scored, values, 0), optimize=True)
    count = np.einsum("bc,sck->bsk", case_counts, scored.astype(float), optimize=True)
    there = count > 0
    class_mean = np.divide(total, count, out=np.zeros_like(total), where=there)
    per_seed = class_mean.sum(axis=2) / np.maximum(there.sum(axis=2), 1)
    return (seed_counts * per_seed).sum(axis=1) / seed_counts.sum(axis=1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): one below α is significant at a family-wise error of α."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


Curve = Sequence[tuple[int, float]]
"""Steps, ascending, and the mean Dice after each."""


def plateau(curve: Curve) -> float | None:
    """Mean Dice over the last quarter of a training; None for an empty curve."""
    return fmean(dice for step, dice in curve if step >= (1 - PLATEAU) * curve[-1][0]) if curve else None


def steps_to(curve: Curve, dice: float) -> float | None:
    """Steps until a curve first has that Dice, by a straight line between two of its points; None where it never has.

    A curve that begins with it counts as having it at its first point.
    """
    before = None
    for step, value in curve:
        if value >= dice:
            return step if before is None else before[0] + (step - before[0]) * (dice - before[1]) / (value - before[1])
        before = step, value
    return None


def median_with_unreached(values: Sequence[float | None]) -> float | None:
    """Median, None counting as larger than any number; None where half or more are None, or there is no value."""
    middle = median([float("inf") if value is None else value for value in values]) if values else float("inf")
    return None if middle == float("inf") else middle
