"""Who may read whose labels: the label budget of few-label trials. `seen` checks that a start kept to it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Protocol

from mixcl_dist.config import ConfigError
from mixcl_dist.data_shards.catalogue import sanitised
from mixcl_dist.settings import BudgetConfig


class LabelledCase(Protocol):
    """What a budget needs to know of a case, in a data set on disk as in the manifest of shards."""

    @property
    def name(self) -> str: ...
    @property
    def dataset(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def reliable(self) -> tuple[str, ...]: ...


def budget_cases(cases: Iterable[LabelledCase], budget: BudgetConfig) -> list[str]:
    """Names of the training cases of one data set whose labels may be used: the first of one order.

    These are `budget.scans` or, rounded up, the share `budget.fraction` of all labelled training cases that are not
    kept back for development; a case is labelled where one of `budget.classes` is annotated. The order depends on
    those cases, those classes and `budget.seed` alone, so budgets of one seed are nested over counts and fractions.
    It begins with few cases that together annotate every one of the classes, the others follow at random.
    Raises `ConfigError` where there are labelled cases, but fewer than `budget.scans`.
    """
    training = [case for case in cases if case.split == "training" and case.name not in budget.development]
    labelled = [case for case in training if readable(case, budget)]
    labelled.sort(key=lambda case: hashlib.sha256(f"{budget.seed}:{_own_name(case)}".encode()).digest())
    count = math.ceil(budget.fraction * len(labelled) - 1e-9)  # 0.07 * 100 is 7.000000000000001
    if budget.scans is not None:
        count = budget.scans
        if labelled and count > len(labelled):
            raise ConfigError(
                f"budget.scans {count}: {labelled[0].dataset} has {len(labelled)} labelled training scans outside "
                f"budget.development; give at most {len(labelled)}"
            )
    return [case.name for case in _every_class_early(labelled, budget)[:count]]


def _own_name(case: LabelledCase) -> str:
    """What a case is called in its data set; shards put that of the data set before it where others share the name."""
    return case.name.removeprefix(f"{sanitised(case.dataset)}-")


def training_cases(cases: Iterable[LabelledCase], budget: BudgetConfig) -> list[str]:
    """Names of the cases whose images pre-training sees: all but those for validation and development."""
    return [case.name for case in cases if case.split != "validation" and case.name not in budget.development]


def readable(case: LabelledCase, budget: BudgetConfig) -> frozenset[str]:
    """The reliably annotated classes of a case that are among `budget.classes`."""
    return frozenset(case.reliable if budget.classes is None else set(case.reliable).intersection(budget.classes))


def check_development(cases: Iterable[LabelledCase], development: Sequence[str]) -> None:
    """Raise `ConfigError` for a development case that is not among the training cases."""
    split = {case.name: case.split for case in cases}
    for name in development:
        if name not in split:
            raise ConfigError(f"budget.development: there is no case {name}; leave it out, or give the data it is of")
        if split[name] != "training":
            raise ConfigError(
                f"budget.development: {name} is in the {split[name]} split; keep back training cases only"
            )


def _every_class_early(cases: Sequence[LabelledCase], budget: BudgetConfig) -> list[LabelledCase]:
    rest, first = list(cases), []
    missing = {name for case in cases for name in readable(case, budget)}
    while missing:
        case = max(rest, key=lambda case: len(missing & readable(case, budget)))
        rest.remove(case)
        first.append(case)
        missing -= readable(case, budget)
    return first + rest
