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
from mixcl_dist.config import Config, ConfigError, from_dict, replace, to_dict
from mixcl_dist.finetuning.finetune import finetune
from mixcl_dist.finetuning.start import like
from mixcl_dist.finetuning.task import Task, budgeted, open_task
from mixcl_dist.networks.dynunet import check_size
from mixcl_dist.run import RunError, held, machine, now, read_json, write_json
from mixcl_dist.seen import KnownScans, Seen, Shared, leak, shared_scans

SEARCH_SEED = 0


def run_study(config: Config, *, data: Path, starts: Sequence[Path], study: Path) -> dict[str, Any]:
    """Run all trials of the table that are not done yet, and return the content of `study.json`.

    `starts` are pre-training runs that together make the arm "pretrained": each trial begins with the one
    that knows most of its own labelled cases and no others. Arm "scratch" has the same recipe and network.
    Trials are scored on development cases where the budget keeps some back, as the best of a search is a choice.
    `study.json` in the folder `study` is written anew after every trial; called again, the study goes on.
    Raises `RunError`, `ConfigError` or `CaseError`, each one line with the cure, before any trial is run.
    """
    with held(study, "--study"):
        return _run_study(config, data=data, starts=starts, study=study)


def _run_study(config: Config, *, data: Path, starts: Sequence[Path], study: Path) -> dict[str, Any]:
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
        if any(row["status"] == "pending" for row in table.content["trials"]):
            raise KeyboardInterrupt  # Tune takes the signal and returns
    return table.content


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
    """One trial of the table, in a process of its own."""
    budget = {"budget.fraction": trial["fraction"], "budget.scans": None, "budget.seed": trial["seed"]}
    start = trial["start"] and Path(trial["start"])
    run = study / "trials" / trial["id"]
    return finetune(replace(from_dict(config), budget | trial["params"]), data=data, start=start, run=run)


class StudyTable:
    """`study.json`: which trials there are and how each ended."""

    def __init__(self, study: Path, trials: Sequence[dict[str, Any]], content: dict[str, Any]) -> None:
        self.content = content
        self._study = study
        self._trials = trials
        self._begin = time.monotonic()
        self._ended = 0
        for row in content["trials"]:
            if (study / row["run"] / "dice.json").exists():
                self._read_result(row)
        self._write()

    @classmethod
    def open(
        cls, study: Path, config: Config, data: Path, starts: Sequence[Path], trials: Sequence[dict[str, Any]]
    ) -> StudyTable:
        """Begin a study in the folder, or go on with it; raises `RunError` where it is another one."""
        names = {str(start): read_json(start / "run.json")["name"] for start in starts}
        question = {
            "config": to_dict(config),
            "data": str(data),
            "starts": [*({"name": name, "path": path} for path, name in names.items()), "scratch"],
            "fractions": list(config.study.fractions),
            "seeds": list(config.study.seeds),
            "scored": "development" if config.budget.development else "validation",
        }
        head = {"kind": "study", "name": study.name, "started": now(), "finished": None}
        if (study / "study.json").exists():
            earlier = read_json(study / "study.json")
            _refuse_another(study, earlier, question)
            head["started"] = earlier["started"]
        (study / "trials").mkdir(parents=True, exist_ok=True)
        rows = [_row(trial) for trial in trials]
        return cls(study, trials, head | question | {"trials": rows, "machine": machine()})

    def pending(self) -> list[dict[str, Any]]:
        done = {row["id"] for row in self.content["trials"] if row["status"] == "done"}
        return [trial for trial in self._trials if trial["id"] not in done]

    def ended(self, outcome: Outcome) -> None:
        """Note a trial's end, and tell of it in one line."""
        row = next(row for row in self.content["trials"] if row["id"] == outcome.trial["id"])
        if outcome.error is None:
            self._read_result(row)
        else:
            row |= {"status": "failed", "error": outcome.error}
        self._write()
        self._ended += 1
        rows = self.content["trials"]
        left = sum(row["status"] == "pending" for row in rows)
        seconds = (time.monotonic() - self._begin) / self._ended
        pace = f"{seconds:.0f} s/trial, {tqdm.format_interval(left * seconds)} left"
        result = f"Dice {row['mean']:.3f}" if row["status"] == "done" else f"failed: {row['error']}"
        print(
            f"{row['id']}: {result} ({len(rows) - left}/{len(rows)} trials, {pace})",
            file=sys.stderr,
            flush=True,
        )

    def _read_result(self, row: dict[str, Any]) -> None:
        folder = self._study / row["run"]
        dice, facts = read_json(folder / "dice.json"), read_json(folder / "run.json")
        row |= {"status": "done", "error": None, "seconds": facts["seconds"]}
        row |= {"mean": dice["mean"], "class_mean": dice["class_mean"]}

    def _write(self) -> None:
        if all(row["status"] != "pending" for row in self.content["trials"]):
            self.content["finished"] = now()
        write_json(self._study / "study.json", self.content)


def _row(trial: dict[str, Any]) -> dict[str, Any]:
    row = {key: trial[key] for key in ("id", "fraction", "seed", "params")}
    row |= {
        "start": "pretrained" if trial["start"] else "scratch",
        "run": f"trials/{trial['id']}",
        "status": "pending",
    }
    return row | {"mean": None, "class_mean": None, "seconds": None, "error": None}


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


def _refuse_another(study: Path, earlier: dict[str, Any], question: dict[str, Any]) -> None:
    """The machine's share for a trial may differ when a study goes on, nothing else."""
    for key, value in question.items():
        known = earlier[key]
        if key == "config":
            value, known = value | {"trials": None}, known | {"trials": None}
        if known != value:
            raise RunError(f"{study}: holds a study with other {key}; give another --study")
