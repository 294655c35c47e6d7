"""One trial of a study, in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mixcl_dist.config import Config, from_dict, replace
from mixcl_dist.finetuning.finetune import finetune
from mixcl_dist.records import DiceRecord, FinetuneRecord
from mixcl_dist.run import LOCK

CACHE = "cases"
"""Folder of a study in which its trials keep what they have read for each other; removed once it has finished."""
CUT_OFF_S = 30
"""How long a process may work on whose machine Ray has given up."""


def run_trial(
    config: dict[str, Any],
    data: Path,
    study: Path,
    trial: dict[str, Any],
    report: Callable[[Mapping[str, float]], None],
) -> dict[str, Any]:
    """Fine-tune as the trial says, going on where an earlier process of it ended; returns what its row holds.

    `report` is told of every point of the curve: {"step", "dice"}.
    """
    start = trial["start"] and Path(trial["start"])
    run = study / "trials" / trial["id"]
    _wait_for_an_earlier_process(run)
    if not (run / DiceRecord.FILE).exists():  # Ray starts a trial again whose process ended after it had finished

        def watch(step: int, dice: float | None) -> None:
            if dice is not None:
                report({"step": step, "dice": dice})

        finetune(settings_of(from_dict(config), trial), data=data, start=start, run=run, resume=True, report=watch,
                 cache=study / CACHE)  # fmt: skip
    return result_of(run)


def _wait_for_an_earlier_process(run: Path) -> None:
    """Until one that has the folder has ended: a lost machine's may work on for a while, and leaves its lock behind.

    Only the process that holds the study starts trials, so nobody else can be at work here for long.
    """
    lock, end = run / LOCK, time.monotonic() + CUT_OFF_S
    while lock.exists() and time.monotonic() < end:
        match lock.read_text().split():
            case [host, pid] if host == os.uname().nodename and not Path(f"/proc/{pid}").exists():
                return  # which the lock itself finds out
        time.sleep(0.5)
    lock.unlink(missing_ok=True)


def result_of(run: Path) -> dict[str, Any]:
    """What a finished trial's row holds of its folder; raises `RunError`."""
    dice, facts = DiceRecord.load(run), FinetuneRecord.load(run)
    return {"mean": dice.mean, "class_mean": dice.class_mean, "seconds": facts.seconds}


def settings_of(config: Config, trial: Mapping[str, Any]) -> Config:
    budget = {"budget.fraction": trial["fraction"], "budget.scans": None, "budget.seed": trial["seed"]}
    return replace(config, budget | trial["params"])
