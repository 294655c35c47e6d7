"""What runs and studies left on disk, read back; nothing here knows how they were made."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixcl_dist.run import RunError, read_json
from mixcl_dist.studies.table import ledger

Arrays = Mapping[str, np.ndarray]
RUN_FILES = (
    "run.json", "config.yaml", "network.json", "metrics.jsonl", "curve.jsonl", "dice.json", "samples.npz",
    "overlays.npz",
)  # fmt: skip
"""What is read of a run."""


@dataclass(frozen=True)
class RunFolder:
    """One pre-training or fine-tuning run; whatever the run had not written yet is None or empty."""

    path: Path
    facts: dict[str, Any]
    config: str
    metrics: list[dict[str, float]]
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


def open_folder(path: Path) -> RunFolder | StudyFolder | TableFolder:
    """Read a RUN, STUDY or TABLE folder; raises `RunError` in one line where it is none or a file of it is broken."""
    if (path / "plan.json").is_file():
        return open_table(path)
    if (path / "study.json").is_file():
        return open_study(path)
    if (path / "run.json").is_file():
        return open_run(path)
    raise RunError(
        f"{path}: neither a run (run.json) nor a study (study.json) nor a table (plan.json); "
        "give the folder of --run, --study, or mixcl table's --out"
    )


def own(folder: Path, name: str) -> Path:
    """`folder`/`name`; raises `RunError` where that leads out of the folder, whose page would then show what lies
    elsewhere: the folder may come from a stranger."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{path}: leads out of {folder}; put the file itself there, or remove it")
    return path


def open_run(path: Path) -> RunFolder:
    for name in RUN_FILES:
        own(path, name)
    facts = read_json(path / "run.json")
    if not isinstance(facts, dict) or facts.get("kind") not in ("pretrain", "finetune"):
        raise RunError(f"{path / 'run.json'}: no run of kind pretrain or finetune; the run must be made again")
    return RunFolder(
        path=path,
        facts=facts,
        config=_read_text(path / "config.yaml"),
        metrics=_read_metrics(path / "metrics.jsonl"),
        dice=_read_optional(path / "dice.json", ("classes", "cases", "class_mean", "mean")),
        samples=_read_arrays(path / "samples.npz", ("clean",)),
        overlays=_read_arrays(path / "overlays.npz", ("image", "truth", "prediction", "cases")),
        network=_read_optional(path / "network.json", ("window_hu",)),
    )


def open_study(path: Path) -> StudyFolder:
    file = own(path, "study.json")
    facts = read_json(file)
    _require(file, facts, ("trials", "starts"))
    for row in facts["trials"]:
        _require(file, row, ("id", "start", "fraction", "seed", "run"))
    trials = [Trial(row, _run_if_there(own(path, row["run"]))) for row in facts["trials"]]
    named = []
    for start in facts["starts"]:
        if start != "scratch":
            _require(file, start, ("name", "path"))
            named.append(Start(start["name"], start["path"], _start_if_there(path, start["path"], trials)))
    return StudyFolder(path, facts, trials, named)


def open_table(path: Path) -> TableFolder:
    file = own(path, "plan.json")
    facts = read_json(file)
    _require(file, facts, ("table", "items"))
    records = _current_records(path, facts["items"])
    trials = [
        _table_trial(path, item, records.get(item["name"], {})) for item in facts["items"] if item["kind"] == "trial"
    ]
    return TableFolder(path, facts, _read_text(path / "config.yaml"), records, trials)


def _current_records(path: Path, items: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The newest record of each planned item, unless other settings or sources have made it, by its digest; a plan
    without digests takes all."""
    newest = {record["item"]: record for record in ledger.read(own(path, "ledger.jsonl"))}
    return {
        item["name"]: record
        for item in items
        if (record := newest.get(item["name"])) and item.get("digest", record["digest"]) == record["digest"]
    }


def _table_trial(path: Path, item: dict[str, Any], record: dict[str, Any]) -> TableTrial:
    run = own(path, item["name"])
    for name in RUN_FILES:
        own(run, name)
    dice = _read_optional(run / "dice.json", ("classes", "cases", "class_mean", "mean"))
    status = record.get("status")
    if status not in ("failed", "barred"):
        status = "done" if status == "done" and dice and dice["mean"] is not None else "planned"
    facts = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    return TableTrial(
        **{key: item[key] for key in ("name", "fold", "arm", "scans", "seed")},
        status=status,
        text=record.get("text", ""),
        seconds=record.get("seconds"),
        dice=(dice or {}) if status == "done" else {},
        curve=[
            (int(row["step"]), row["mean"]) for row in _read_metrics(run / "curve.jsonl") if row.get("mean") is not None
        ],
        unshown=tuple(facts.get("unshown_classes", ())),
    )


def _start_if_there(study: Path, start: str, trials: Sequence[Trial]) -> RunFolder | None:
    """A start's path is as it was typed: relative to where the study ran, or to the study's folder.

    It lies outside the study, and is read where a trial that began from it lists every scan that it was trained on:
    then it is that start, not a later run or another's at the same path.
    """
    there = next((place for place in (Path(start), study / start) if (place / "run.json").is_file()), None)
    known = [set(t.run.facts.get("training_cases", ())) for t in trials if t.run and t.run.facts.get("start") == start]
    if there is None or not known:
        return None
    run = open_run(there)
    trained_on = set(run.facts.get("training_cases", ()))
    return run if trained_on and any(trained_on <= cases for cases in known) else None


def _run_if_there(path: Path) -> RunFolder | None:
    return open_run(path) if (path / "run.json").is_file() else None


def _read_optional(path: Path, needed: Sequence[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content = read_json(path)
    _require(path, content, needed)
    return content


def _require(path: Path, content: Any, needed: Sequence[str]) -> None:
    for name in needed:
        if not isinstance(content, Mapping) or name not in content:
            raise RunError(f"{path}: {name!r} is missing; remove the file or make the run again")


def _read_text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _read_metrics(path: Path) -> list[dict[str, float]]:
    """The logged steps; a last line that a killed run left half-written is dropped."""
    lines = path.read_text().splitlines() if path.is_file() else []
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise RunError(f"{path}: line {number} is no JSON object; remove it or make the run again") from None
    return metrics


def _read_arrays(path: Path, needed: Sequence[str]) -> Arrays | None:
    if not path.is_file():
        return None
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        raise RunError(f"{path}: not a whole .npz file; remove it or make the run again") from None
    _require(path, arrays, needed)
    return arrays
