"""From a configuration to all that has to be run for its table, in the order in which it is run. Reads no file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mixcl_dist.config import Config, ConfigError, replace
from mixcl_dist.settings import ArmConfig, FoldConfig, StageConfig, TableConfig

RANDOM = "random"
"""The baseline that no stage makes: a network with random weights."""
REACH = {"none": 0, "budget": 1, "all": 2}
"""Whose labels a stage has read, from nobody's to everybody's."""


@dataclass(frozen=True)
class Item:
    """Something to run: a pre-training, a supervised one, a probe of either, or a trial."""

    name: str
    """Also its folder within that of the table; a probe's figures lie in the folder of the run that it probes."""
    kind: Literal["pretrain", "supervised", "probe", "trial"]
    settings: dict[str, Any] = field(default_factory=dict)
    """What differs from the table's configuration, by dotted key."""
    start: str | None = None
    """Item from whose run it starts, or which it probes; None: random weights."""
    gate: tuple[str, ...] = ()
    """Probes: that of its start, which has to beat all others, and those."""
    arm: str = ""
    scans: int = 0
    seed: int = 0
    fold: str = ""
    """Of a trial its place in the table; `fold` is empty in the few-label block."""

    @property
    def needs(self) -> tuple[str, ...]:
        return (*([self.start] if self.start else []), *self.gate)


def plan(config: Config) -> dict[str, Item]:
    """Every item by its name, each after those that it needs, what tells most first.

    That is `first_arms` at `first_scans`, then their other arms, then `first_arms` at more scans, then the rest; each
    seed by seed, so that a table which is cut short has whole pairs. Label-free stages are run once, others for each
    (scans, seed) or fold. Raises `ConfigError`, in one line, for arms and stages that do not fit together.
    """
    check(config.table)
    planner = _Planner(config)
    for trial in sorted(_cells(config.table), key=lambda cell: _order(config.table, cell)):
        planner.trial(*trial)
    return planner.items


def shown(config: Config, kind: str) -> tuple[int, int]:
    """Steps of an item of that kind, and the voxels that they show its network, of both views or of crops."""
    if kind == "pretrain":
        steps = config.pretrain.steps
        return steps, steps * config.pretrain.batch_size * 2 * math.prod(config.views.size)
    steps = config.finetune.steps
    return steps, steps * config.finetune.batch_size * math.prod(config.finetune.patch_size)


Cell = tuple[str, str, int, int]
"""Fold (empty in the few-label block), arm, scans, seed."""


def _cells(table: TableConfig) -> Iterator[Cell]:
    for arm in table.arms:
        yield from (("", arm, scans, seed) for scans in table.scans for seed in table.seeds)
    others = table.other_organs
    for fold in others.folds:
        for arm in others.arms:
            yield from ((fold, arm, scans, seed) for scans in others.scans for seed in table.seeds)


def _order(table: TableConfig, cell: Cell) -> tuple[int, ...]:
    fold, arm, scans, seed = cell
    folds, arms = list(table.other_organs.folds), list(table.other_organs.arms if fold else table.arms)
    tier = (arm not in table.first_arms) + 2 * (scans not in table.first_scans) if not fold else 1
    first = arm not in table.first_arms
    return tier, table.seeds.index(seed), bool(fold), first, folds.index(fold) if fold else 0, scans, arms.index(arm)


class _Planner:
    """Adds to `items` a trial after all that it needs."""

    def __init__(self, config: Config) -> None:
        self.config, self.table = config, config.table
        self.items: dict[str, Item] = {}

    def trial(self, fold: str, arm: str, scans: int, seed: int) -> None:
        block = self.table.other_organs.arms if fold else self.table.arms
        stage = block[arm].stage
        settings = _labels("budget", scans, seed) | self._longer(block[arm])
        if fold:
            settings["finetune.classes"] = list(self.table.other_organs.folds[fold].new)
        gate = self._gate(stage, fold, scans) if stage else ()
        start = self._stage(stage, fold, scans, seed) if stage else None
        name = f"trial/{fold}/" if fold else "trial/"
        place = {"arm": arm, "scans": scans, "seed": seed, "fold": fold}
        self._add(Item(f"{name}{arm}-n{scans}-s{seed}", "trial", settings, start, gate, **place))  # type: ignore[arg-type]

    def _stage(self, name: str, fold: str, scans: int, seed: int) -> str:
        stage = self.table.stages[name]
        start = self._stage(stage.start, fold, scans, seed) if stage.start else None
        reach = _reach(self.table.stages, name)
        labels = _labels(stage.labels, scans, seed)
        if stage.labels == "all":
            key = "finetune.classes" if stage.supervised else "budget.classes"
            labels[key] = list(self.table.other_organs.folds[fold].known)
        elif stage.labels == "budget" and self.config.finetune.classes is not None:
            labels["budget.classes"] = list(self.config.finetune.classes)  # on which the order of scans depends
        if reach == "budget":
            labels["pretrain.seed"] = seed
        kind: Any = "supervised" if stage.supervised else "pretrain"
        suffix = {"none": "", "budget": f"-n{scans}-s{seed}", "all": f"-{fold}"}[reach]
        return self._add(Item(f"pretrain/{name}{suffix}", kind, labels | stage.settings, start))

    def _gate(self, name: str, fold: str, scans: int) -> tuple[str, ...]:
        """A stage is judged at each number of scans by its first seed, for all seeds: to judge each by itself would
        keep those that happened to do well."""
        if name in self.table.baselines or self.table.stages[name].supervised:
            return ()
        baselines = [self._probe(baseline, "", 0) for baseline in self.table.baselines]
        return (self._probe(name, fold, scans), *baselines) if baselines else ()

    def _probe(self, name: str, fold: str, scans: int) -> str:
        if name == RANDOM:
            return self._add(Item(f"probe/{RANDOM}", "probe"))
        run = self._stage(name, fold, scans, self.table.seeds[0])
        return self._add(Item(f"probe/{run.partition('/')[2]}", "probe", start=run))

    def _longer(self, arm: ArmConfig) -> dict[str, Any]:
        """Steps with which a trial shows its network as many voxels as pre-training and a trial together."""
        if arm.voxels_of is None:
            return {}
        more, stage = 0.0, arm.voxels_of
        while stage:
            kind = "supervised" if self.table.stages[stage].supervised else "pretrain"
            more += shown(replace(self.config, self.table.stages[stage].settings), kind)[1]
            stage = self.table.stages[stage].start or ""
        batch = self.config.finetune.batch_size * math.prod(self.config.finetune.patch_size)
        return {"finetune.steps": self.config.finetune.steps + math.ceil(more / batch)}

    def _add(self, item: Item) -> str:
        self.items.setdefault(item.name, item)
        return item.name


def _labels(whose: str, scans: int, seed: int) -> dict[str, Any]:
    if whose == "budget":
        return {"budget.fraction": 0.0, "budget.scans": scans, "budget.seed": seed}
    return {"budget.fraction": float(whose == "all"), "budget.scans": None}


def _reach(stages: Mapping[str, StageConfig], name: str) -> str:
    """The most that a stage and those before it have read."""
    stage = stages[name]
    before = _reach(stages, stage.start) if stage.start else "none"
    return max(stage.labels, before, key=REACH.__getitem__)


def check(table: TableConfig) -> None:
    """Raise `ConfigError`, in one line, for arms and stages that do not fit together."""
    if not table.arms and not table.other_organs.arms:
        raise ConfigError("table.arms is empty, so there is nothing to compare; give --recipe few_label")
    _check_stages(table)
    others = table.other_organs
    for section, arms, compared, known in (
        ("table", table.arms, table.compared, "all"),
        ("table.other_organs", others.arms, others.compared, "budget"),
    ):
        block = f"{section}.arms"
        if arms and "scratch" not in arms:
            raise ConfigError(
                f"{block}: arm scratch is missing, from which all differences are taken; add scratch: {{}}"
            )
        for name, arm in arms.items():
            for stage in filter(None, (arm.stage, arm.voxels_of)):
                _check_arm(f"{block}.{name}", table.stages, stage, known)
        _check_pairs(f"{section}.compared", compared, arms)
    for name in table.first_arms:
        if name not in table.arms:
            raise ConfigError(f"table.first_arms: {name} is no arm; arms: {', '.join(table.arms)}")
    for fold, organs in table.other_organs.folds.items():
        _check_fold(fold, organs)


def _check_stages(table: TableConfig) -> None:
    known = ", ".join(table.stages)
    for name, stage in table.stages.items():
        seen = [name]
        while stage.start is not None:
            if stage.start not in table.stages:
                raise ConfigError(
                    f"table.stages.{seen[-1]}: starts from {stage.start}, which is no stage; stages: {known}"
                )
            if stage.start in seen:
                ring = " → ".join([*seen, stage.start])
                raise ConfigError(f"table.stages.{name}: starts from itself, by {ring}; leave one of these starts out")
            seen.append(stage.start)
            stage = table.stages[stage.start]
    for name in table.baselines:
        if name not in (RANDOM, *table.stages):
            raise ConfigError(f"table.baselines: {name} is no stage; stages: {RANDOM}, {', '.join(table.stages)}")
        if name != RANDOM and _reach(table.stages, name) != "none":
            raise ConfigError(f"table.baselines: {name} reads labels; a baseline of the gate must not: leave it out")


def _check_arm(where: str, stages: Mapping[str, StageConfig], stage: str, forbidden: str) -> None:
    if stage not in stages:
        raise ConfigError(f"{where}: {stage} is no stage; stages: {', '.join(stages)}")
    if _reach(stages, stage) == forbidden:
        reads = {"all": "the labels of all scans", "budget": "labels of new organs"}[forbidden]
        raise ConfigError(f"{where}: stage {stage} reads {reads}, which exceeds its trials' budget; give another stage")


def _check_pairs(where: str, pairs: Sequence[tuple[str, str]], arms: Mapping[str, ArmConfig]) -> None:
    for pair in pairs:
        for arm in pair:
            if arm not in arms:
                raise ConfigError(f"{where}: {arm} is no arm; arms: {', '.join(arms)}")
        if len(set(pair)) == 1:
            raise ConfigError(f"{where}: {pair[0]} cannot be compared with itself; give another arm")


def _check_fold(name: str, fold: FoldConfig) -> None:
    if both := set(fold.known) & set(fold.new):
        raise ConfigError(f"table.other_organs.folds.{name}: {min(both)} is known and new; leave it out of one of them")
    if not (fold.known and fold.new):
        raise ConfigError(f"table.other_organs.folds.{name}: lacks known or new organs; name some of both")
