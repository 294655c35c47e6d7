"""Who may read whose labels: the label budget of few-label trials, and the check that pre-training kept to it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol


class LabelledCase(Protocol):
    """What a budget needs to know of a case, in a data set on disk as in the manifest of shards."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def reliable(self) -> tuple[str, ...]: ...


def budget_cases(cases: Iterable[LabelledCase], fraction: float, seed: int) -> list[str]:
    """Names of the training cases whose labels may be used: the first `fraction` (rounded up) of one order.

    The order depends on the cases and `seed` alone, so budgets of one seed are nested over fractions. It begins
    with few cases that together annotate every class, the others follow at random.
    """
    labelled = [case for case in cases if case.split == "training" and case.reliable]
    labelled.sort(key=lambda case: hashlib.sha256(f"{seed}:{case.name}".encode()).digest())
    count = math.ceil(fraction * len(labelled) - 1e-9)  # 0.07 * 100 is 7.000000000000001
    return [case.name for case in _every_class_early(labelled)[:count]]


def _every_class_early(cases: Sequence[LabelledCase]) -> list[LabelledCase]:
    rest, first = list(cases), []
    missing = {name for case in cases for name in case.reliable}
    while missing:
        case = max(rest, key=lambda case: len(missing.intersection(case.reliable)))
        rest.remove(case)
        first.append(case)
        missing.difference_update(case.reliable)
    return first + rest


def leak(facts: Mapping[str, Any], cases: Sequence[LabelledCase], budget: Collection[str]) -> str | None:
    """What a pre-training run has seen that a trial on `cases` with the labels of `budget` must not know.

    `facts` is the run's `run.json`. Labels of cases that are not among `cases` (another data set) are no leak.
    Returns None, or one line naming a case and the cure.
    """
    names = {case.name for case in cases}
    validation = {case.name for case in cases if case.split == "validation"}
    if seen := sorted(validation.intersection(facts["training_cases"])):
        return (
            f"was pre-trained on validation case {seen[0]}{_others(seen)}; "
            "pre-train on shards built without the validation split"
        )
    if withheld := sorted(names.intersection(facts["label_cases"]) - set(budget)):
        return (
            f"was pre-trained with the labels of case {withheld[0]}{_others(withheld)}, outside the trial's budget "
            f"of {len(budget)}; pre-train with the trial's --budget.fraction and --budget.seed"
        )
    return None


def _others(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
