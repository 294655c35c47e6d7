"""How a study stands, read from its folder while it runs: for the terminal and for its page."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from mixcl_dist.records import StudyRecord, TrialRecord
from mixcl_dist.run import LOCK
from mixcl_dist.studies import ledger
from mixcl_dist.studies.rows import LEDGER, PROBE, fold

ENDS = ("done", "stopped", "failed")
RECENT = 50
"""Ends of trials that the rate is measured on."""
LOOK_EVERY_S = 2.0
REST = 10
"""Times as long as a look takes nothing is looked at: thousands of trials take a second of their machine's time."""
SHOWN = 5


@dataclass(frozen=True)
class Standing:
    """A study at this moment."""

    name: str
    rows: tuple[TrialRecord, ...]
    planned: int
    """Trials, those that have yet to be proposed too."""
    seconds_left: float | None
    """By the rate of the newest ends; None before there are two."""
    gpus: float
    """Share of GPUs that the running trials have."""
    driver: str | None
    """Host and process that runs it; None where nobody does."""

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(row.status for row in self.rows)
        found["pending"] += self.planned - len(self.rows)
        return {status: count for status, count in found.items() if count}

    @property
    def ended(self) -> bool:
        return not {"pending", "running"} & self.counts.keys()

    @property
    def best(self) -> list[TrialRecord]:
        """Finished trials, the best first."""
        scored = [row for row in self.rows if row.status == "done" and row.mean is not None]
        return sorted(scored, key=lambda row: -(row.mean or 0))

    @property
    def failed(self) -> list[TrialRecord]:
        return [row for row in self.rows if row.status == "failed"]


def standing(study: Path) -> Standing:
    """Raises `RunError` for a folder that holds no study."""
    record, lines = StudyRecord.load(study), ledger.read(study / LEDGER)
    rows = tuple(fold(record.trials, lines).values())
    asked = record.config.get("study", {})
    planned = asked.get("samples", 0) if asked.get("method", "random") != "random" else 0
    planned = max(planned, len(rows))
    over = sum(row.status in (*ENDS, "barred") for row in rows)
    running = sum(row.status == "running" for row in rows)
    return Standing(
        name=record.name,
        rows=rows,
        planned=planned,
        seconds_left=_seconds_left(lines, planned - over),
        gpus=running * _share(record, lines),
        driver=_driver(study),
    )


def _share(record: StudyRecord, lines: list[ledger.LedgerRecord]) -> float:
    """GPUs of a trial, as given or as the newest probe measured."""
    given = (record.config.get("trials") or {}).get("gpus", 0.0)
    measured = [line["gpus"] for line in lines if line["item"] == PROBE and "gpus" in line]
    return given if isinstance(given, int | float) else (measured or [1.0])[-1]


def _seconds_left(lines: list[ledger.LedgerRecord], left: int) -> float | None:
    times = [datetime.fromisoformat(line["date"]) for line in lines if line["status"] in ENDS and "date" in line]
    recent = times[-RECENT:]
    if not left:
        return 0.0
    if len(recent) < 2:
        return None
    return left * (recent[-1] - recent[0]).total_seconds() / (len(recent) - 1)


def _driver(study: Path) -> str | None:
    try:
        host, pid, *_job = (study / LOCK).read_text().split()
    except (OSError, ValueError):
        return None
    return f"process {pid} of {host}"


def text(now: Standing) -> str:
    """A few lines for a terminal."""
    counts = ", ".join(f"{count} {status}" for status, count in now.counts.items())
    left = f"; {tqdm.format_interval(now.seconds_left)} left" if now.seconds_left else ""
    if now.driver is None and now.ended:
        by = "all have ended; mixcl report makes a page of them"
    else:
        by = f"{now.driver} runs it" if now.driver else "nobody runs it; the same mixcl tune command goes on"
    lines = [f"{now.name}: {counts} of {now.planned} trials{left}", f"  {by}"]
    if now.gpus:
        lines[1] += f", {now.gpus:g} GPUs in use"
    for row in now.best[:SHOWN]:
        params = ", ".join(f"{key} {_short(value)}" for key, value in row.params.items())
        lines.append(f"  Dice {row.mean:.3f}  {row.id}" + (f"  ({params})" if params else ""))
    for row in now.failed[:SHOWN]:
        lines.append(f"  failed    {row.id}: {row.error}" + (f" ({row.log})" if row.log else ""))
    return "\n".join(lines)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def watch(study: Path) -> None:
    """Show how a study stands until all its trials have ended, or nobody runs it; where output is no terminal, once."""
    while True:
        begin = time.monotonic()
        now = standing(study)
        on_terminal = sys.stdout.isatty()
        print(("\033[H\033[J" if on_terminal else "") + text(now), flush=True)
        if not on_terminal or now.driver is None or now.ended:
            return
        time.sleep(max(LOOK_EVERY_S, REST * (time.monotonic() - begin)))
