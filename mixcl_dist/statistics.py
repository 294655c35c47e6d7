"""How sure a mean of few seeds is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values with its two-sided 95 % Student t-interval; `sd`, `low`, `high` are None below two values."""

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def t_interval(values: Sequence[float]) -> Interval:
    """Summarise independent values, e.g. the paired differences of several seeds."""
    n = len(values)
    if n == 0:
        return Interval(0, None, None, None, None)
    mean = fmean(values)
    if n == 1:
        return Interval(1, mean, None, None, None)
    sd = stdev(values)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / n**0.5
    return Interval(n, mean, sd, mean - half, mean + half)
