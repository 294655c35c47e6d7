"""What a few-label table found: differences of arms by number of scans, and a row for every trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
import yaml

from mixcl_dist.config import ConfigError, from_dict, replace
from mixcl_dist.report.folders import TableFolder, TableTrial
from mixcl_dist.report.results import SCRATCH, Line, points, spread, with_interval
from mixcl_dist.studies.statistics import (
    CONFIDENCE,
    Difference,
    holm,
    mean_difference,
    median_with_unreached,
    plateau,
    steps_to,
)
from mixcl_dist.studies.table.plan import shown

AT_ZERO = 0.01
"""A class whose mean Dice in a trial is below this was not learnt at all."""
LEAST_SEEDS = 5
"""With fewer the headline calls nothing sure."""


@dataclass(frozen=True)
class Speed:
    """Steps that an arm needs to its reference's plateau Dice of the same scans and seed, as a share of its own."""

    ratio: float | None
    """Median over seeds; None where at least half of them do not reach it."""
    reached: int
    pairs: int


@dataclass(frozen=True)
class Row:
    """All trials of an arm at one number of labelled scans, in the few-label block or a fold."""

    fold: str
    arm: str
    scans: int
    planned: int
    done: int
    failed: int
    barred: str | None
    """Why its trials were not run."""
    mean: float | None
    sd: float | None
    """Of the trials' mean Dice over seeds."""
    class_mean: dict[str, float | None]
    zeros: dict[str, int]
    """Class → trials in which it was not learnt."""
    hd95_mm: float | None
    surface_dice: float | None


@dataclass(frozen=True)
class Pair:
    """An arm minus its reference at one number of labelled scans, in the few-label block or a fold."""

    fold: str
    arm: str
    reference: str
    scans: int
    arm_mean: float | None
    reference_mean: float | None
    """Mean Dice over the seeds that both have."""
    difference: Difference
    p_holm: float | None
    """Adjusted for all comparisons of the table."""
    speed: Speed | None


@dataclass(frozen=True)
class Training:
    """What the networks of an arm have been shown by each trial's end, in the few-label block or a fold."""

    fold: str
    arm: str
    pretrain_steps: int
    """Of all stages before the trial, one after the other."""
    pretrain_voxels: int
    finetune_steps: int
    finetune_voxels: int


@dataclass(frozen=True)
class TableResults:
    rows: list[Row]
    pairs: list[Pair]
    """Every arm with scratch, then `compared`, of each block."""
    training: list[Training]
    classes: list[str]
    arms: list[str]
    scans: list[int]
    blocks: list[str]
    """The few-label block, as "", and the folds."""
    done: int
    planned: int
    headline: str


def table_results(table: TableFolder) -> TableResults:
    keys = list(dict.fromkeys((trial.fold, trial.arm, trial.scans) for trial in table.trials))
    block_order, arms = ["", *table.facts["table"]["other_organs"]["folds"]], _arms(table)
    keys.sort(key=lambda key: (block_order.index(key[0]), key[2], arms.index(key[1])))
    rows, pairs = [_row(table.trials, *key) for key in keys], _pairs(table, keys)
    done, planned = sum(trial.status == "done" for trial in table.trials), len(table.trials)
    return TableResults(
        rows=rows,
        pairs=pairs,
        training=_training(table),
        classes=list(dict.fromkeys(name for trial in table.trials for name in (trial.dice or {}).get("classes", []))),
        arms=arms,
        scans=sorted({row.scans for row in rows}),
        blocks=[block for block in block_order if any(row.fold == block for row in rows)],
        done=done,
        planned=planned,
        headline=" ".join(filter(None, [not_final(table), _headline(table, rows, pairs, done, planned)])),
    )


def not_final(table: TableFolder) -> str:
    """A sentence where the trials were scored for choosing, else nothing."""
    choosing = not table.facts["table"].get("final", True)
    return "Scored on development scans, for choosing between recipes: no final figures." if choosing else ""


def _arms(table: TableFolder) -> list[str]:
    section = table.facts["table"]
    return list(dict.fromkeys([SCRATCH, *section["arms"], *section["other_organs"]["arms"]]))


def _row(trials: Sequence[TableTrial], fold: str, arm: str, scans: int) -> Row:
    own = [trial for trial in trials if (trial.fold, trial.arm, trial.scans) == (fold, arm, scans)]
    done = [trial for trial in own if trial.status == "done"]
    means = [trial.dice["mean"] for trial in done if trial.dice["mean"] is not None]
    classes = list(dict.fromkeys(name for trial in done for name in trial.dice["classes"]))
    by_class = {name: [_class_means(trial, "dice").get(name) for trial in done] for name in classes}
    return Row(
        fold=fold,
        arm=arm,
        scans=scans,
        planned=len(own),
        done=len(done),
        failed=sum(trial.status == "failed" for trial in own),
        barred=next((trial.text for trial in own if trial.status == "barred"), None),
        mean=_mean(means),
        sd=stdev(means) if len(means) > 1 else None,
        class_mean={name: _mean(values) for name, values in by_class.items()},
        zeros={name: sum(v is not None and v < AT_ZERO for v in values) for name, values in by_class.items()},
        hd95_mm=_mean(_summary(trial, "hd95_mm") for trial in done),
        surface_dice=_mean(_summary(trial, "surface_dice") for trial in done),
    )


def _pairs(table: TableFolder, keys: Sequence[tuple[str, str, int]]) -> list[Pair]:
    section = table.facts["table"]
    pairs = []
    for fold, scans in dict.fromkeys((fold, scans) for fold, _, scans in keys):
        arms = [arm for block, arm, count in keys if (block, count) == (fold, scans)]
        listed = (section["other_organs"] if fold else section).get("compared", ())
        compared = [(arm, SCRATCH) for arm in arms if arm != SCRATCH] + [(arm, other) for arm, other in listed]
        for arm, reference in dict.fromkeys(compared):
            pairs.append(_pair(table.trials, fold, arm, reference, scans, section["resamples"]))
    known = [i for i, pair in enumerate(pairs) if pair.difference.p is not None]
    adjusted = holm([pairs[i].difference.p for i in known])  # type: ignore[misc]
    for i, p in zip(known, adjusted, strict=True):
        pairs[i] = dataclasses.replace(pairs[i], p_holm=p)
    return pairs


def _pair(trials: Sequence[TableTrial], fold: str, arm: str, reference: str, scans: int, resamples: int) -> Pair:
    def done(which: str) -> dict[int, TableTrial]:
        wanted = (fold, which, scans, "done")
        return {t.seed: t for t in trials if (t.fold, t.arm, t.scans, t.status) == wanted}

    own, other = done(arm), done(reference)
    both = [(own[seed], other[seed]) for seed in sorted(own.keys() & other.keys())]
    return Pair(
        fold=fold,
        arm=arm,
        reference=reference,
        scans=scans,
        arm_mean=_mean(trial.dice["mean"] for trial, _ in both),
        reference_mean=_mean(trial.dice["mean"] for _, trial in both),
        difference=mean_difference(_differences(both), resamples),
        p_holm=None,
        speed=_speed(both),
    )


def _training(table: TableFolder) -> list[Training]:
    """By the first trial of each arm, as all have equally many steps; nothing of a folder without config.yaml, or with
    one of a version whose settings were others."""
    if not table.config:
        return []
    try:
        config = from_dict(yaml.safe_load(table.config))
    except ConfigError:
        return []
    items = {item["name"]: item for item in table.facts["items"]}
    first = {(trial.fold, trial.arm): trial.name for trial in reversed(table.trials)}
    told = []
    for (fold, arm), name in reversed(first.items()):
        (steps, voxels), *before = (
            shown(replace(config, item["settings"]), item["kind"]) for item in _with_starts(items, name)
        )
        told.append(Training(fold, arm, sum(s for s, _ in before), sum(v for _, v in before), steps, voxels))
    return told


def _with_starts(items: Mapping[str, dict[str, Any]], name: str | None) -> Iterator[dict[str, Any]]:
    """An item, that from which it starts, and so on."""
    while name:
        yield items[name]
        name = items[name]["start"]


def _mean(values: Iterable[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return fmean(kept) if kept else None


def _class_means(trial: TableTrial, name: str) -> dict[str, float | None]:
    """Of each class that the trial could learn the mean over cases of Dice, or of another score by its name."""
    scores = trial.dice if name == "dice" else trial.dice.get(name)  # which trials of earlier versions do not have
    means = scores["class_mean"] if scores else {}
    return {key: value for key, value in means.items() if key not in trial.unshown}


def _summary(trial: TableTrial, name: str) -> float | None:
    return _mean(_class_means(trial, name).values())


def _differences(pairs: Sequence[tuple[TableTrial, TableTrial]]) -> np.ndarray:
    """(seeds, cases, classes) Dice of an arm minus its reference's, NaN where there is none or nothing to learn."""
    cases = list(dict.fromkeys(case for trial, _ in pairs for case in trial.dice["cases"]))
    classes = list(dict.fromkeys(name for trial, _ in pairs for name in trial.dice["classes"]))

    def scores(trial: TableTrial) -> np.ndarray:
        found = [[trial.dice["cases"].get(case, {}).get(name) for name in classes] for case in cases]
        values = np.array(found, dtype=float).reshape(len(cases), len(classes))  # None becomes NaN
        values[:, [name in trial.unshown for name in classes]] = np.nan
        return values

    if not pairs:
        return np.empty((0, 0, 0))
    return np.stack([scores(trial) - scores(other) for trial, other in pairs])


def _speed(pairs: Sequence[tuple[TableTrial, TableTrial]]) -> Speed | None:
    ratios: list[float | None] = []
    for trial, reference in pairs:
        goal = plateau(reference.curve)
        needed = None if goal is None else steps_to(reference.curve, goal)
        if goal is not None and needed and trial.curve:
            steps = steps_to(trial.curve, goal)
            ratios.append(None if steps is None else steps / needed)
    if not ratios:
        return None
    return Speed(median_with_unreached(ratios), sum(ratio is not None for ratio in ratios), len(ratios))


def _headline(table: TableFolder, rows: Sequence[Row], pairs: Sequence[Pair], done: int, planned: int) -> str:
    """One sentence: the arm that the table is about, at the fewest scans that tell of it."""
    arm = next((name for name in table.facts["table"]["first_arms"] if name != SCRATCH), None)
    own = [pair for pair in pairs if (pair.fold, pair.arm, pair.reference) == ("", arm, SCRATCH)]
    so_far = "" if done == planned else f", by {done} of {planned} planned trials so far"
    told = next((pair for pair in own if pair.difference.mean is not None), None)
    if told is not None:
        return _sentence(told, so_far, one_start=_shares_pretraining(table, told.arm))
    if barred := next((row.barred for row in rows if (row.fold, row.arm) == ("", arm) and row.barred), None):
        return (
            f"No trial of {arm} was run, as its pre-training did not pass the gate ({barred.removeprefix('barred: ')})."
        )
    return f"No pair of trials of {arm} and scratch has finished yet{so_far}."


def _shares_pretraining(table: TableFolder, arm: str) -> bool:
    """Whether all seeds of an arm go on from one pre-training, which reads no labels and so is run once."""
    section = table.facts["table"]
    stage = section["stages"].get(section["arms"][arm]["stage"])
    while stage and stage["start"]:
        stage = section["stages"][stage["start"]]
    return bool(stage) and stage["labels"] == "none"


def _sentence(pair: Pair, so_far: str, *, one_start: bool) -> str:
    found = pair.difference
    assert found.mean is not None and pair.arm_mean is not None and pair.reference_mean is not None
    where = f"With {pair.scans} labelled {'scan' if pair.scans == 1 else 'scans'}"
    change = (
        f"mean Dice was {100 * pair.reference_mean:.1f} from scratch and {100 * pair.arm_mean:.1f} with {pair.arm}: "
        f"{points(found.mean)} points"
    )
    if found.low is None:
        return f"{where}, {change} in {found.seeds} pair of trials, too few for an interval{so_far}."
    interval = (
        f"{CONFIDENCE:.0%} interval {points(found.low)} to {points(found.high)} over {found.seeds} subset seeds and "
        f"{found.cases} cases{', given one label-free pre-training' if one_start else ''}"
    ).replace("%", " %")
    told = f"{where}, {change} ({interval}){so_far}"
    if found.seeds < LEAST_SEEDS:
        return f"{told}; fewer than {LEAST_SEEDS} seeds cannot tell whether pre-training helps."
    if found.excludes_zero and pair.p_holm is not None and pair.p_holm < 1 - CONFIDENCE:
        return f"{told}."
    return f"{told}, which cannot tell whether pre-training helps."


def trial_rows(table: TableFolder, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each planned trial: its place, how it stands, its figures (Dice from 0 to 1, mm, seconds)."""
    scratch = {(t.fold, t.scans, t.seed): t for t in table.trials if t.arm == SCRATCH and t.status == "done"}
    rows = []
    for trial in table.trials:
        dice = trial.dice if trial.status == "done" else None
        class_mean = _class_means(trial, "dice")
        other = scratch.get((trial.fold, trial.scans, trial.seed))
        goal = plateau(other.curve) if dice and other else None
        needed = None if goal is None else steps_to(trial.curve, goal)
        rows.append(
            {"trial": trial.name, "fold": trial.fold, "arm": trial.arm, "scans": trial.scans, "seed": trial.seed}
            | {"status": trial.status, "dice": dice and dice["mean"]}
            | {"hd95_mm": dice and _summary(trial, "hd95_mm"), "surface_dice": dice and _summary(trial, "surface_dice")}
            | {"classes_at_zero": sum(v is not None and v < AT_ZERO for v in class_mean.values()) if dice else None}
            | {"steps_to_scratch_plateau": None if needed is None else round(needed)}
            | {"seconds": trial.seconds, "text": trial.text}
            | {f"dice_{name}": class_mean.get(name) for name in classes}
        )
    return rows


def lines(results: TableResults) -> Iterator[Line]:
    from_scratch = {(p.fold, p.scans, p.arm): p for p in results.pairs if p.reference == SCRATCH}
    for row in results.rows:
        pair = from_scratch.get((row.fold, row.scans, row.arm))
        name = f"{row.fold}/{row.arm}" if row.fold else row.arm
        told = row.barred or (_gain(pair) if pair else "")
        yield Line(str(row.scans), name, f"{row.done} of {row.planned}", spread(row.mean, row.sd), told)


def text_rows(results: TableResults) -> str:
    """Mean Dice and difference of every arm, then every other comparison, as lines for a terminal."""
    rows = [f"{'scans':>5}  {'arm':<16} {'trials':>8}  {'mean Dice':>11}  difference from scratch (95 % interval)"]
    for scans, arm, trials, dice, told in lines(results):
        done, _, planned = trials.partition(" of ")
        rows.append(f"{scans:>5}  {arm:<16} {done:>3} of {planned:<3} {dice or '–':>11}  {told}")
    for pair in results.pairs:
        if pair.reference != SCRATCH and pair.difference.mean is not None:
            name = f"{pair.fold}/{pair.arm}" if pair.fold else pair.arm
            rows.append(f"{pair.scans:>5}  {name} − {pair.reference}: {_gain(pair)}")
    return "\n".join(line.rstrip() for line in rows)


def _gain(pair: Pair) -> str:
    found = pair.difference
    return "" if found.mean is None else with_interval(found.mean, found.low, found.high)
