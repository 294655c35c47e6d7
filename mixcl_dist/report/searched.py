"""What a search found: its best points, which settings mattered, and what stopping trials early has saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from mixcl_dist.records import TrialRecord
from mixcl_dist.report.folders import StudyFolder

FEWEST = 8
"""Trials of which it is said which setting mattered."""
BEST = 10
PARTS = 4


@dataclass(frozen=True)
class Judged:
    """A trial's point and its Dice after as many steps as all others."""

    id: str
    params: dict[str, Any]
    dice: float
    status: str


@dataclass(frozen=True)
class SearchResults:
    keys: tuple[str, ...]
    best: tuple[TrialRecord, ...]
    judged: tuple[Judged, ...]
    step: int | None
    """After which `judged` were; None: at their ends."""
    shares: dict[str, float]
    """Setting → share of the variance of (ranks of) Dice that goes with it alone; empty for too few trials."""
    stopped: int
    saved: float
    """Share of the steps of all trials that have ended which was not taken, as trials were stopped early."""


def search_results(study: StudyFolder) -> SearchResults | None:
    """None for a study without a search."""
    config = study.facts.get("config", {})
    asked = config.get("study", {})
    if not asked.get("search"):
        return None
    rows = study.standing.rows
    keys = tuple(asked["search"])
    step = asked.get("grace_steps") if asked.get("stopping", "none") != "none" else None
    judged = [Judged(row.id, row.params, dice, row.status) for row in rows if (dice := _dice_at(row, step)) is not None]
    ended = [row for row in rows if row.status in ("done", "stopped")]
    steps = config.get("finetune", {}).get("steps", 0)
    taken = sum(row.reports[-1][0] if row.status == "stopped" and row.reports else steps for row in ended)
    return SearchResults(
        keys=keys,
        best=tuple(study.standing.best[:BEST]),
        judged=tuple(judged),
        step=step,
        shares={key: share_of(judged, key) for key in keys} if len(judged) >= FEWEST else {},
        stopped=sum(row.status == "stopped" for row in ended),
        saved=1 - taken / (steps * len(ended)) if ended and steps else 0.0,
    )


def _dice_at(row: TrialRecord, step: int | None) -> float | None:
    if step is None:
        return row.mean if row.status == "done" else None
    return next((dice for at, dice in row.reports if at >= step), None)


def share_of(judged: Sequence[Judged], key: str) -> float:
    """Of the variance of the ranks of Dice the share that goes with one setting alone: the correlation ratio over its
    values, or over `PARTS` equally frequent parts of a range; over the trials that have the setting, less what chance
    alone would give (adjusted as R² is)."""
    found = [(one.params[key], one.dice) for one in judged if key in one.params]
    n, ranks = len(found), stats.rankdata([dice for _, dice in found])
    groups = _parts([value for value, _ in found])
    total, freedom = float(((ranks - ranks.mean()) ** 2).sum()) if n else 0.0, len(set(groups)) - 1
    if total == 0 or freedom < 1 or n <= freedom + 1:
        return 0.0
    of_group = [ranks[np.array(groups) == group] for group in set(groups)]
    raw = sum(len(one) * (one.mean() - ranks.mean()) ** 2 for one in of_group) / total
    return float(max(0.0, 1 - (1 - raw) * (n - 1) / (n - 1 - freedom)))


def _parts(values: Sequence[Any]) -> list[str]:
    """Each value's group."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or len(set(values)) <= PARTS:
        return [repr(value) for value in values]
    edges = np.quantile(values, np.linspace(0, 1, PARTS + 1)[1:-1])
    return [str(part) for part in np.searchsorted(edges, values)]


def position(values: Sequence[Any]) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Where values lie on an axis from 0 to 1, and a few marks on it: ranges that span decades by their logarithm, sets
    in their order."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if numbers and len(set(values)) > PARTS:
        low, high = min(values), max(values)
        scaled = np.log if low > 0 and high / low > 20 else np.asarray
        ends = scaled(np.array([low, high], dtype=float))
        at = (scaled(np.array(values, dtype=float)) - ends[0]) / (ends[1] - ends[0])
        return at, [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")]
    groups = sorted({repr(value) for value in values})
    places = {group: number / max(1, len(groups) - 1) for number, group in enumerate(groups)}
    return np.array([places[repr(value)] for value in values]), [(at, group) for group, at in places.items()]
