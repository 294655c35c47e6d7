"""What runs and studies left on disk, read back; nothing here knows how they were made."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixcl_dist.config import Config, ConfigError, replace
from mixcl_dist.data_shards.catalogue import sanitised
from mixcl_dist.errors import RunError
from mixcl_dist.records import (
    ANEW,
    CURVE,
    METRICS,
    CasePrediction,
    DiceRecord,
    FinetuneRecord,
    NetworkRecord,
    PlannedItem,
    PlanRecord,
    PredictionRecord,
    RunRecord,
    StartRecord,
    StudyRecord,
    TrialRecord,
    read_curve,
    read_metrics,
    told,
)
from mixcl_dist.run import CONFIG, read_config
from mixcl_dist.studies import ledger
from mixcl_dist.studies.rows import LEDGER
from mixcl_dist.studies.table.plan import check
from mixcl_dist.studies.watching import Standing, standing

Arrays = Mapping[str, np.ndarray]
RUN_FILES = (
    RunRecord.FILE, CONFIG, NetworkRecord.FILE, METRICS, CURVE, DiceRecord.FILE, "samples.npz", "overlays.npz",
)  # fmt: skip
"""What is read of a run."""
OVERLAY_ARRAYS = ("image", "truth", "prediction", "cases")


@dataclass(frozen=True)
class RunFolder:
    """One pre-training or fine-tuning run; whatever the run had not written yet is None or empty."""

    path: Path
    facts: dict[str, Any]
    config: str
    metrics: list[dict[str, float]]
    curve: list[dict[str, float]]
    """Mean Dice, 0 to 100, on development scans, by step, where a trial has such scans."""
    dice: dict[str, Any] | None
    samples: Arrays | None
    overlays: Arrays | None
    network: dict[str, Any] | None

    @property
    def window_hu(self) -> tuple[float, float]:
        """HU that -1 and 1 stand for in the pictures of this run."""
        low, high = (self.network or {}).get("window_hu", (-1000.0, 1000.0))
        return float(low), float(high)


@dataclass(frozen=True)
class Trial:
    """A row of the study's table; `run` is None until the trial has made its folder."""

    row: dict[str, Any]
    run: RunFolder | None


@dataclass(frozen=True)
class Start:
    """A pre-trained start; `run` is None where its folder is no longer at hand."""

    name: str
    path: str
    run: RunFolder | None


@dataclass(frozen=True)
class StudyFolder:
    path: Path
    facts: dict[str, Any]
    trials: list[Trial]
    starts: list[Start]
    standing: Standing


@dataclass(frozen=True)
class TableTrial:
    """A planned trial of a few-label table; what it has not left yet is None or empty."""

    name: str
    fold: str
    arm: str
    scans: int
    seed: int
    status: str
    """done, failed, barred, or planned."""
    text: str
    """Its record's line: the figures, the last line of an error, or what bars it."""
    seconds: float | None
    dice: dict[str, Any]
    curve: list[tuple[int, float]]
    """Step and mean Dice on development scans."""
    unshown: tuple[str, ...]
    """Classes that none of its labelled scans shows; there was nothing to learn of them."""


@dataclass(frozen=True)
class TableFolder:
    """A few-label table: its plan, each item's record as now planned, its trials in the order in which they are run."""

    path: Path
    facts: dict[str, Any]
    config: str
    records: dict[str, dict[str, Any]]
    trials: list[TableTrial]


@dataclass(frozen=True)
class PredictionFolder:
    """Scans that a network was applied to; `cases` are those that are done, `slices` by their names."""

    path: Path
    facts: dict[str, Any]
    cases: list[CasePrediction]
    slices: dict[str, Arrays]


def open_folder(path: Path) -> RunFolder | StudyFolder | TableFolder | PredictionFolder:
    """Read the folder of a run, study, table or prediction; raises `RunError` in one line where it is none or a file of
    it is broken."""
    if (path / PredictionRecord.FILE).is_file():
        return open_prediction(path)
    if (path / PlanRecord.FILE).is_file():
        return open_table(path)
    if (path / StudyRecord.FILE).is_file():
        return open_study(path)
    if (path / RunRecord.FILE).is_file():
        return open_run(path)
    raise RunError(
        f"{path}: neither a run (run.json) nor a study (study.json) nor a table (plan.json) nor a prediction "
        "(prediction.json); give the folder of --run, --study, or the --out of mixcl table or predict"
    )


def own(folder: Path, name: str) -> Path:
    """`folder`/`name`; raises `RunError` where that leads out of the folder, whose page would then show what lies
    elsewhere: the folder may come from a stranger."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{path}: leads out of {folder}; put the file itself there, or remove it")
    return path


def bare(path: str) -> str:
    """What a page calls a data set, a run or shards: the folders around them may be called after patients."""
    *around, last = [part for part in path.split("/") if part] or [path]
    return around[-1] if around and last in ("dataset.json", "cases.json") else last


def _without(text: str, *places: str | Path) -> str:
    """A message without the folders around these places."""
    for place in places:
        text = text.replace(f"{Path(place).parent}/", "")
    return text


def open_run(path: Path) -> RunFolder:
    for name in RUN_FILES:
        own(path, name)
    dice, network = DiceRecord.load_if_there(path), NetworkRecord.load_if_there(path)
    return RunFolder(
        path=path,
        facts=told(RunRecord.load(path)),
        config=_config(path),
        metrics=read_metrics(path / METRICS),
        curve=[{"step": at.step, "dice": 100 * at.mean} for at in read_curve(path / CURVE) if at.mean is not None],
        dice=dice.content() if dice else None,
        samples=_read_arrays(path / "samples.npz", ("clean",)),
        overlays=_read_arrays(path / "overlays.npz", OVERLAY_ARRAYS),
        network=network.content() if network else None,
    )


def open_prediction(path: Path) -> PredictionFolder:
    record = PredictionRecord.read(own(path, PredictionRecord.FILE))
    files = {name: own(path, f"cases/{_plain(name, path)}.json") for name in record.cases}
    cases = [CasePrediction.read(file) for file in files.values() if file.is_file()]
    slices = {case.case: own(path, f"slices/{_plain(case.case, path)}.npz") for case in cases}
    read = {name: _read_arrays(file, OVERLAY_ARRAYS) for name, file in slices.items()}
    refused = [{"case": one.case, "problem": _pathless(one.problem)} for one in record.refused]
    facts = record.content() | {"data": bare(record.data), "refused": refused}
    return PredictionFolder(path, facts, cases, {name: found for name, found in read.items() if found})


def _pathless(text: str) -> str:
    """A message without the files that it names."""
    return re.sub(r"(?<!\w)/\S+", "…", text)


def _plain(name: str, prediction: Path) -> str:
    """A case's name in a file's; raises `RunError` where it is none."""
    if sanitised(name) != name:
        raise RunError(f"{prediction / PredictionRecord.FILE}: {name!a} is no name of a case; predict again")
    return name


def _config(path: Path) -> str:
    """The text of `config.yaml`, which is one; empty where there is none."""
    if not (path / CONFIG).is_file():
        return ""
    read_config(path)
    return (path / CONFIG).read_text()


def open_study(path: Path) -> StudyFolder:
    record = StudyRecord.read(own(path, StudyRecord.FILE))
    own(path, LEDGER)
    now = standing(path)
    places = [str(path.resolve()), record.data]
    places += [start.path for start in record.starts if isinstance(start, StartRecord)]
    trials = [
        Trial(
            told(row) | {"status": row.status, "error": row.error and _without(row.error, *places)},
            _run_of_trial(path, row),
        )
        for row in now.rows
    ]
    starts = [
        Start(start.name, start.path, _start_if_there(path, start.path, trials))
        for start in record.starts
        if start != "scratch"
    ]
    return StudyFolder(path, told(record) | {"data": bare(record.data)}, trials, starts, now)


def _run_of_trial(study: Path, row: TrialRecord) -> RunFolder | None:
    """The run of a row, None where it has none yet; raises `RunError` where its folder holds another trial."""
    folder = own(study, row.run)
    if not (folder / RunRecord.FILE).is_file():
        return None
    facts = FinetuneRecord.read(own(folder, RunRecord.FILE))
    for name, asked, found in (("fraction", row.fraction, facts.fraction), ("seed", row.seed, facts.seed)):
        if found is not None and found != asked:
            raise RunError(
                f"{folder / RunRecord.FILE}: {name} is {found}, but {asked} in study.json: it is another trial; "
                "move it elsewhere and run mixcl tune again"
            )
    return open_run(folder)


def open_table(path: Path) -> TableFolder:
    plan = PlanRecord.read(own(path, PlanRecord.FILE))
    config = _config(path)
    _check_settings(path, plan)
    records = _current_records(path, plan.items)
    for record in records.values():
        record["text"] = _without(record.get("text", ""), path.resolve(), plan.data, plan.shards)
    trials = [_table_trial(path, item, records.get(item.name)) for item in plan.items if item.kind == "trial"]
    found = {name: {"linear": None, "knn": None, **record} for name, record in records.items()}
    facts = plan.content() | {"data": bare(plan.data), "shards": bare(plan.shards)}
    return TableFolder(path, facts, config, found, trials)


def _check_settings(path: Path, plan: PlanRecord) -> None:
    """Raise `RunError` for a table whose parts do not fit together, or an item whose settings are none."""
    config = read_config(path) if (path / CONFIG).is_file() else Config()
    try:
        check(plan.table)
        for settings in {repr(item.settings): item.settings for item in plan.items}.values():
            replace(config, settings)
    except ConfigError as error:
        raise RunError(f"{path / plan.FILE}: {error}; {plan.CURE}") from None


def _current_records(path: Path, items: Sequence[PlannedItem]) -> dict[str, ledger.LedgerRecord]:
    """The newest record of each planned item, unless other settings or sources have made it, by its digest; a plan
    without digests takes all."""
    newest = {record["item"]: record for record in ledger.read(own(path, "ledger.jsonl"))}
    return {
        item.name: record
        for item in items
        if (record := newest.get(item.name)) and (item.digest or record["digest"]) == record["digest"]
    }


def _table_trial(path: Path, item: PlannedItem, record: ledger.LedgerRecord | None) -> TableTrial:
    run = own(path, item.name)
    for name in RUN_FILES:
        own(run, name)
    dice, facts = DiceRecord.load_if_there(run), FinetuneRecord.load_if_there(run)
    status = record["status"] if record else "planned"
    if status not in ("failed", "barred"):
        status = "done" if status == "done" and dice else "planned"
    return TableTrial(
        **{key: getattr(item, key) for key in ("name", "fold", "arm", "scans", "seed")},
        status=status,
        text=record.get("text", "") if record else "",
        seconds=record.get("seconds") if record else None,
        dice=dice.content() if dice and status == "done" else {},
        curve=[(point.step, point.mean) for point in read_curve(run / CURVE) if point.mean is not None],
        unshown=facts.unshown_classes if facts else (),
    )


def _start_if_there(study: Path, start: str, trials: Sequence[Trial]) -> RunFolder | None:
    """A start's path is as it was typed: relative to where the study ran, or to the study's folder.

    It lies outside the study, and is read where a trial that began from it lists every scan that it was trained on:
    then it is that start, not a later run or another's at the same path.
    """
    there = next((place for place in (Path(start), study / start) if (place / RunRecord.FILE).is_file()), None)
    known = [set(t.run.facts.get("training_cases", ())) for t in trials if t.run and t.run.facts.get("start") == start]
    if there is None or not known:
        return None
    run = open_run(there)
    trained_on = set(run.facts.get("training_cases", ()))
    return run if trained_on and any(trained_on <= cases for cases in known) else None


def _read_arrays(path: Path, needed: Sequence[str]) -> Arrays | None:
    if not path.is_file():
        return None
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        raise RunError(f"{path}: not a whole .npz file; remove it, or {ANEW}") from None
    if missing := [name for name in needed if name not in arrays]:
        raise RunError(f"{path}: {missing[0]!r} is missing; remove the file, or {ANEW}")
    return arrays
