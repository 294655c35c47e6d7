"""One trial of a study, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mixcl_dist.config import Config, from_dict, replace
from mixcl_dist.finetuning.finetune import finetune
from mixcl_dist.records import DiceRecord, FinetuneRecord


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
    if not (run / DiceRecord.FILE).exists():  # Ray starts a trial again whose process ended after it had finished

        def watch(step: int, dice: float | None) -> None:
            if dice is not None:
                report({"step": step, "dice": dice})

        finetune(settings_of(from_dict(config), trial), data=data, start=start, run=run, resume=True, report=watch)
    return result_of(run)


def result_of(run: Path) -> dict[str, Any]:
    """What a finished trial's row holds of its folder; raises `RunError`."""
    dice, facts = DiceRecord.load(run), FinetuneRecord.load(run)
    return {"mean": dice.mean, "class_mean": dice.class_mean, "seconds": facts.seconds}


def settings_of(config: Config, trial: Mapping[str, Any]) -> Config:
    budget = {"budget.fraction": trial["fraction"], "budget.scans": None, "budget.seed": trial["seed"]}
    return replace(config, budget | trial["params"])
