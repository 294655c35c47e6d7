"""The table of few-label trials: starts × label fractions × subset seeds × searched values."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixcl_dist.cluster.trials import Outcome, draw, run_trials
from mixcl_dist.config import Config, ConfigError, differences, from_dict, replace, to_dict
from mixcl_dist.finetuning.finetune import finetune
from mixcl_dist.finetuning.start import like
from mixcl_dist.finetuning.task import Task, budgeted, open_task
from mixcl_dist.networks.dynunet import check_size
from mixcl_dist.records import DiceRecord, FinetuneRecord, RunError, RunRecord, StartRecord, StudyRecord, TrialRecord
from mixcl_dist.run import held, machine, now, read_config
from mixcl_dist.seen import KnownScans, Seen, Shared, check_split, leak, shared_scans

SEARCH_SEED = 0


def run_study(config: Config, *, data: Path, starts: Sequence[Path], study: Path) -> StudyRecord:
    """Run all trials of the table that are not done yet, and return what `study.json` holds.

    `starts` are pre-training runs that together make the arm "pretrained": each trial begins with the one
    that knows most of its own labelled cases and no others. Arm "scratch" has the same recipe and network.
    Trials are scored on development cases where the budget keeps some back, as the best of a search is a choice.
    `study.json` in the folder `study` is written anew after every trial; called again, the study goes on.
    Raises `RunError`, `ConfigError` or `CaseError`, each one line with the cure, before any trial is run.
    """
    with held(study, "--study"):
        return _run_study(config, data=data, starts=starts, study=study)


def _run_study(config: Config, *, data: Path, starts: Sequence[Path], study: Path) -> StudyRecord:
    if config.study.search and not config.budget.development:
        raise ConfigError(
            "study.search: the best draw would be chosen on validation scans; name training scans to choose on in "
            "budget.development, or leave the search out"
        )
    data, study, starts = data.resolve(), study.resolve(), [start.resolve() for start in starts]
    task = open_task(data, config)
    config = _common_network(config, starts)
    known = KnownScans(study / "trials")
    table = StudyTable.open(study, config, data, starts, plan(config, task, starts, known))
    known.save()  # where the trials look for it
    pending = table.pending()
    if pending:
        trial = functools.partial(run_trial, to_dict(config), data, study)
        read = [data, *starts]
        run_trials(trial, pending, storage=study / "tune", read=read, config=config.trials, ended=table.ended)
        if any(row.status == "pending" for row in table.record.trials):
            raise KeyboardInterrupt  # Tune takes the signal and returns
    return table.record


def plan(config: Config, task: Task, starts: Sequence[Path], known: KnownScans) -> list[dict[str, Any]]:
    """The trials of the table; raises `RunError` where no start may be used for one of them."""
    shared = {start: shared_scans(Seen.load(start), known.of(task.cases)) for start in starts}
    points = draw(config.study.search, config.study.samples, SEARCH_SEED)
    for params in points:
        _check_trial(replace(config, params), params)
    trials = []
    for fraction in config.study.fractions:
        for seed in config.study.seeds:
            budget = dataclasses.replace(config.budget, fraction=fraction, scans=None, seed=seed)
            label_cases = budgeted(task, budget)
            check_split(task.cases, label_cases, task.held_out, known)  # what looks alike, each trial says
            arms: dict[str, Path | None] = {"scratch": None}
            if starts:
                arms["pretrained"] = _lawful_start(shared, task, label_cases)
            for number, params in enumerate(points):
                suffix = f"-p{number}" if config.study.search else ""
                for arm, start in arms.items():
                    key = {"id": f"{arm}-{fraction:g}-s{seed}{suffix}", "fraction": fraction, "seed": seed}
                    trials.append(key | {"start": start and str(start), "params": params})
    return trials


def _check_trial(config: Config, params: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for what a trial would refuse, or would not read."""
    for key in params:
        if not key.startswith(("finetune.", "network.")):
            raise ConfigError(f"study.search: a trial does not read {key}; search settings of finetune")
    check_size("finetune.patch_size", config.network, config.finetune.patch_size)


def run_trial(config: dict[str, Any], data: Path, study: Path, trial: dict[str, Any]) -> dict[str, Any]:
    """One trial of the table, in a process of its own; its result is what it leaves in its folder."""
    start = trial["start"] and Path(trial["start"])
    run = study / "trials" / trial["id"]
    if not (run / DiceRecord.FILE).exists():  # Ray starts a trial again whose process ended after it had finished
        finetune(_settings(from_dict(config), trial), data=data, start=start, run=run)
    return {}


def _settings(config: Config, trial: dict[str, Any]) -> Config:
    budget = {"budget.fraction": trial["fraction"], "budget.scans": None, "budget.seed": trial["seed"]}
    return replace(config, budget | trial["params"])


class StudyTable:
    """`study.json`: which trials there are and how each ended."""

    def __init__(self, study: Path, config: Config, trials: Sequence[dict[str, Any]], record: StudyRecord) -> None:
        self.record = record
        self._study, self._config, self._begin = study, config, time.monotonic()
        self._trials = {trial["id"]: trial for trial in trials}
        self._ended = 0
        for row in record.trials:
            if (study / row.run / DiceRecord.FILE).exists():
                self._set(self._result(row))
        self._write()

    @classmethod
    def open(
        cls, study: Path, config: Config, data: Path, starts: Sequence[Path], trials: Sequence[dict[str, Any]]
    ) -> StudyTable:
        """Begin a study in the folder, or go on with it; raises `RunError` where it is another one, or a trial in it is
        another trial."""
        record = StudyRecord(
            name=study.name,
            started=now(),
            config=to_dict(config),
            data=str(data),
            starts=(*(StartRecord(name=RunRecord.load(start).name, path=str(start)) for start in starts), "scratch"),
            fractions=config.study.fractions,
            seeds=config.study.seeds,
            scored="development" if config.budget.development else "validation",
            trials=tuple(_row(trial) for trial in trials),
            machine=machine(),
        )
        if (earlier := StudyRecord.load_if_there(study)) is not None:
            _refuse_another(study, earlier, record)
            record = dataclasses.replace(record, started=earlier.started)
        (study / "trials").mkdir(parents=True, exist_ok=True)
        return cls(study, config, trials, record)

    def pending(self) -> list[dict[str, Any]]:
        return [self._trials[row.id] for row in self.record.trials if row.status != "done"]

    def ended(self, outcome: Outcome) -> None:
        """Note a trial's end, and tell of it in one line."""
        row = next(row for row in self.record.trials if row.id == outcome.trial["id"])
        if outcome.error is None:
            row = self._result(row)
        else:
            row = dataclasses.replace(row, status="failed", error=outcome.error)
        self._set(row)
        self._write()
        self._ended += 1
        rows = self.record.trials
        left = sum(row.status == "pending" for row in rows)
        seconds = (time.monotonic() - self._begin) / self._ended
        pace = f"{seconds:.0f} s/trial, {tqdm.format_interval(left * seconds)} left"
        dice = "–" if row.mean is None else f"{row.mean:.3f}"
        result = f"Dice {dice}" if row.status == "done" else f"failed: {row.error}"
        print(f"{row.id}: {result} ({len(rows) - left}/{len(rows)} trials, {pace})", file=sys.stderr, flush=True)

    def _result(self, row: TrialRecord) -> TrialRecord:
        """`row` with what the trial's folder holds; raises `RunError` where that is another trial's."""
        folder = self._study / row.run
        dice, facts = DiceRecord.load(folder), FinetuneRecord.load(folder)
        self._refuse_another_trial(row, folder, facts)
        return dataclasses.replace(
            row, status="done", error=None, seconds=facts.seconds, mean=dice.mean, class_mean=dice.class_mean
        )

    def _refuse_another_trial(self, row: TrialRecord, folder: Path, facts: FinetuneRecord) -> None:
        trial = self._trials[row.id]
        changed = differences(read_config(folder), _settings(self._config, trial))
        changed = [key for key in changed if not key.startswith("trials.")]
        changed += ["the start"] if facts.start != trial["start"] else []
        if changed:
            raise RunError(
                f"{folder}: holds a trial of other {', '.join(changed)} than this study's; move it elsewhere, and the "
                "same command runs it anew"
            )

    def _set(self, row: TrialRecord) -> None:
        rows = tuple(row if known.id == row.id else known for known in self.record.trials)
        self.record = dataclasses.replace(self.record, trials=rows)

    def _write(self) -> None:
        if all(row.status != "pending" for row in self.record.trials):
            self.record = dataclasses.replace(self.record, finished=now())
        self.record.save(self._study)


def _row(trial: dict[str, Any]) -> TrialRecord:
    arm = "pretrained" if trial["start"] else "scratch"
    known = {key: trial[key] for key in ("id", "fraction", "seed", "params")}
    return TrialRecord(**known, start=arm, run=f"trials/{trial['id']}")


def _common_network(config: Config, starts: Sequence[Path]) -> Config:
    """`config` with the network of the starts, which then is that of the scratch arm, too."""
    if not starts:
        return config
    first, *others = [like(config, start) for start in starts]
    for start, other in zip(starts[1:], others, strict=True):
        if other != first:
            raise RunError(f"{start}: another network or spacing than {starts[0]}; make two studies of them")
    return first


def _lawful_start(shared: Mapping[Path, Sequence[Shared]], task: Task, label_cases: Sequence[str]) -> Path:
    """The start that knows most of `label_cases` and nothing that this trial must not know."""
    budget = task.labels_of(label_cases)
    rules: dict[str, Any] = {"held_out": task.held_out, "budget": budget, "classes": task.classes}
    problems = {start: leak(scans, **rules) for start, scans in shared.items()}
    lawful = [start for start in shared if problems[start] is None]
    if not lawful:
        start = next(iter(shared))
        raise RunError(f"{start}: {problems[start]}")
    return max(lawful, key=lambda start: len({one.case for one in shared[start] if one.labels & set(task.classes)}))


def _refuse_another(study: Path, earlier: StudyRecord, record: StudyRecord) -> None:
    """The machine's share for a trial may differ when a study goes on, nothing else."""
    for key in ("config", "data", "starts", "fractions", "seeds", "scored"):
        value, known = getattr(record, key), getattr(earlier, key)
        if key == "config":
            value, known = value | {"trials": None}, known | {"trials": None}
        if known != value:
            raise RunError(f"{study}: holds a study with other {key}; give another --study")
