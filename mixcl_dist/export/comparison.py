"""The few-label table or study in which a network was compared with others, for its model card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixcl_dist.errors import RunError
from mixcl_dist.records import NetworkRecord, PlanRecord, RunRecord, StudyRecord
from mixcl_dist.report import results, table
from mixcl_dist.report.folders import StudyFolder, TableFolder, open_folder
from mixcl_dist.report.results import Line

_DEPTH = 3
"""Most folders between a table and one of its runs."""


@dataclass(frozen=True)
class Comparison:
    """What was found, in words and by line, and what the network is in it."""

    kind: Literal["few-label table", "study"]
    name: str
    role: str
    found: str
    scored: str
    """Which cases."""
    draws: int
    """Of searched values, of which the best on those cases is shown."""
    lines: tuple[Line, ...]


def compared(run: Path, folder: Path | None) -> Comparison | None:
    """Of the table or study in `folder`, or without one in that which the run lies in, if any trial of it has ended.

    Raises `RunError` for a `folder` that is another, or in which neither the run nor its start is compared.
    """
    around = folder or _around(run)
    if around is None:
        return None
    opened = open_folder(around)
    if not isinstance(opened, TableFolder | StudyFolder):
        raise RunError(f"{around}: is no few-label table or study; give the --out of mixcl table or --study of tune")
    if role := _role(opened, run):
        found = _of_table(opened, role) if isinstance(opened, TableFolder) else _of_study(opened, role)
        if any(line.dice for line in found.lines):
            return found
    if folder is None:
        return None
    if not role:
        cure = "give the one that compares it, or leave --table out"
        raise RunError(f"{folder}: compares neither {run} nor what it began from; {cure}")
    raise RunError(f"{folder}: no trial has finished; give its command again, or leave --table out")


def _around(run: Path) -> Path | None:
    folders = run.resolve().parents[:_DEPTH]
    return next((each for each in folders for kind in (PlanRecord, StudyRecord) if (each / kind.FILE).is_file()), None)


def _role(opened: TableFolder | StudyFolder, run: Path) -> str:
    """What the run is there, or what it began from; empty where they are nothing."""
    places, start = list(_places(opened)), RunRecord.load(run).start
    for name, place in places:
        if _is_same(place, run):
            return f"This network is its {name}."
    for name, place in places:
        if start and _is_same(place, Path(start)):
            return f"This network began from its {name}."
    return ""


def _is_same(place: Path, run: Path) -> bool:
    """Whether they are one folder, or hold the same weights."""
    return place.resolve() == run.resolve() or (bool(digests := _digests(run)) and digests == _digests(place))


def _places(opened: TableFolder | StudyFolder) -> Iterator[tuple[str, Path]]:
    """Every network of it, by name."""
    if isinstance(opened, TableFolder):
        yield from ((item["name"], opened.path / item["name"]) for item in opened.facts["items"])
        return
    for trial in opened.trials:
        yield f"trial {trial.row['id']}", opened.path / trial.row["run"]
    for start in opened.starts:
        yield from ((f"start {start.name}", place) for place in (Path(start.path), opened.path / start.path))
    for trial in opened.trials:  # one that the study pre-trained itself
        if trial.run and trial.run.facts.get("start"):
            yield "pre-trained start", Path(trial.run.facts["start"])


def _digests(place: Path) -> dict[str, str]:
    network = NetworkRecord.load_if_there(place)
    return network.digests if network else {}


def _of_table(opened: TableFolder, role: str) -> Comparison:
    found, name = table.table_results(opened), str(opened.facts["name"])
    scored = "validation" if opened.facts["table"].get("final", True) else "development"
    lines = tuple(table.lines(found))
    return Comparison("few-label table", name, role, found.headline, scored, draws=1, lines=lines)


def _of_study(opened: StudyFolder, role: str) -> Comparison:
    found, name = results.study_results(opened), str(opened.facts["name"])
    scored, lines = opened.facts.get("scored", "validation"), tuple(results.lines(found))
    return Comparison("study", name, role, " ".join(results.headline(found)), scored, found.draws, lines)
