"""What a data set asks of a segmentation network, and which of its labels a trial may use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixcl_dist.budget import budget_cases, check_development
from mixcl_dist.config import Config, ConfigError
from mixcl_dist.data_shards.catalogue import IGNORED, Catalogue
from mixcl_dist.data_shards.sources import Case, CaseError, Source, open_source
from mixcl_dist.data_shards.sources.splits import how_to_split
from mixcl_dist.settings import BudgetConfig


@dataclass(frozen=True)
class Task:
    """What a data set asks of a segmentation network."""

    cases: tuple[Case, ...]
    catalogue: Catalogue
    """All classes of the data set, as labels are read."""
    classes: tuple[str, ...]
    """Those to learn and score, each reliably annotated in some training case; output k > 0 of the network is
    `classes[k - 1]`."""
    kept_back: tuple[str, ...] = ()
    """Names of the training cases that choices are made on."""

    @property
    def validation(self) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if case.split == "validation" and self.known(case).any())

    @property
    def development(self) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if case.name in self.kept_back and self.known(case).any())

    @property
    def held_out(self) -> dict[str, str]:
        """Names of the cases whose images nothing may be learnt from → what they are held out for."""
        validation = {case.name: "validation" for case in self.cases if case.split == "validation"}
        return validation | dict.fromkeys(self.kept_back, "development")

    def labels_of(self, names: Sequence[str]) -> dict[str, frozenset[str]]:
        """Of the named cases the classes that are learnt from them."""
        case_of = {case.name: case for case in self.cases}
        return {name: frozenset(case_of[name].reliable).intersection(self.classes) for name in names}

    def known(self, case: Case) -> np.ndarray:
        """Which outputs are reliably annotated in `case`: (K + 1,) bool, entry 0 (background) False."""
        return np.array([False, *(name in case.reliable for name in self.classes)])

    def target(self, case: Case, label: np.ndarray) -> np.ndarray:
        """`label` in the catalogue's numbers → uint8 in the outputs' numbers, 0 where no known class lies; `IGNORED`
        stays."""
        names = self.catalogue.classes
        number = [self.classes.index(name) + 1 if name in self.classes else 0 for name in names]
        trusted = [n if name in case.reliable else 0 for n, name in zip(number, names, strict=True)]
        number_of = np.full(IGNORED + 1, IGNORED, dtype=np.uint8)
        number_of[: len(trusted) + 1] = [0, *trusted]
        return number_of[label]


def open_task(data: Path, config: Config | None = None) -> Task:
    """The cases and classes of a data set, as far as `config` (None: the default) lets a trial know them.

    Raises `CaseError` unless there are labelled training and validation cases, and development cases where some are
    asked for, and `ConfigError` for a development case that is none of the training cases, or a class that none of
    them annotates.
    """
    config = config or Config()
    source = open_source(data)
    if source.problems:
        raise source.problems[0]
    check_development(source.cases, config.budget.development)
    training = [case for case in source.cases if case.split == "training"]
    learnt = {name for case in training for name in case.reliable}
    classes = _chosen_classes(tuple(name for name in source.classes if name in learnt), config)
    task = Task(source.cases, Catalogue(source.classes), classes, config.budget.development)
    _refuse_unless_labelled(task, source, data)
    if task.kept_back and not task.development:
        raise CaseError("no development case has labels", where=data, cure="list labelled ones in budget.development")
    return task


def _refuse_unless_labelled(task: Task, source: Source, data: Path) -> None:
    """Raise `CaseError` where there is nothing to learn from, or nothing to score on, with what such a source needs."""
    if not task.classes:
        scored = any(case.split == "validation" for case in task.cases)
        cure = "leave some labelled cases out of 'validation'" if scored else source.labels_from
        raise CaseError("no training case has labels", where=data, cure=cure)
    if not task.validation:
        folder = data if data.is_dir() else data.parent
        labelled = [case for case in task.cases if case.split == "training" and task.known(case).any()]
        of = "" if not any(case.split == "validation" for case in task.cases) else f" of {', '.join(task.classes)}"
        raise CaseError(f"no validation case has labels{of}", where=data, cure=how_to_split(labelled, folder))


def _chosen_classes(annotated: tuple[str, ...], config: Config) -> tuple[str, ...]:
    """Those of the annotated classes that are in the budget and to be learnt."""
    chosen = annotated
    for key, names in (("budget.classes", config.budget.classes), ("finetune.classes", config.finetune.classes)):
        if unknown := set(names or ()) - set(chosen):
            raise ConfigError(f"{key}: no label of {min(unknown)} may be read; choose among {', '.join(chosen)}")
        chosen = chosen if names is None else tuple(name for name in chosen if name in names)
    return chosen


def budgeted(task: Task, budget: BudgetConfig) -> list[str]:
    """Names of the cases whose labels this budget gives; raises `ConfigError` for one that is empty or impossible."""
    names = budget_cases(task.cases, dataclasses.replace(budget, classes=task.classes))
    if not names:
        raise ConfigError("the label budget is empty, so there is nothing to learn from; give --scans or --labels")
    return names
