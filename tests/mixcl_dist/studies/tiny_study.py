"""A study of tiny trials on a cluster, as the process that drives it: `python tiny_study.py DATA STUDY ADDRESS`."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

SEEDS, STEPS = int(os.environ.get("MIXCL_STUDY_TRIALS", "60")), 2


def tiny(config, data, study, trial, report):
    """In place of a fine-tuning: two steps with a checkpoint after each, and what such a trial leaves."""
    from mixcl_dist.config import from_dict, replace, to_yaml
    from mixcl_dist.records import DiceRecord, FinetuneRecord

    run = study / "trials" / trial["id"]
    run.mkdir(exist_ok=True)
    done = run / "done"
    if not (run / DiceRecord.FILE).exists():
        for step in range(1, STEPS + 1):
            if not done.exists() or int(done.read_text()) < step:
                time.sleep(0.1)
                with (run / "calls").open("a") as calls:
                    calls.write(f"{step} {os.getpid()}\n")
                (run / "new").write_text(str(step))
                (run / "new").replace(done)
            report({"step": step, "dice": dice_of(trial["seed"], step)})
        budget = {"budget.fraction": trial["fraction"], "budget.seed": trial["seed"]}
        (run / "config.yaml").write_text(to_yaml(replace(from_dict(config), budget)))
        FinetuneRecord(name=run.name, finished="2026-01-01", label_cases=()).save(run)
        DiceRecord(classes=("organ",), cases={}, class_mean={"organ": 0.5}, mean=dice_of(trial["seed"], 3)).save(run)
    return {"mean": dice_of(trial["seed"], 3), "class_mean": {"organ": 0.5}, "seconds": 0.2}


def dice_of(seed, step):
    return round((seed * 37 % 101 + step) / 110, 4)


def rows(study):
    """What a row of the table says, but times."""
    from mixcl_dist.records import StudyRecord

    told = [dataclasses.asdict(row) for row in StudyRecord.load(Path(study)).trials]
    return [
        {key: row[key] for key in ("id", "seed", "status", "mean", "class_mean", "reports", "error")} for row in told
    ]


if __name__ == "__main__":
    from mixcl_dist.config import Config, replace
    from mixcl_dist.studies import study as study_module

    study_module.run_trial = tiny
    data, folder, address = sys.argv[1:]
    settings = {"study.fractions": [1.0], "study.seeds": list(range(SEEDS)), "finetune.curve_every": 1}
    settings |= {"trials.address": address, "trials.max_failures": 20, "finetune.steps": STEPS}
    content = study_module.run_study(replace(Config(), settings), data=Path(data), starts=[], study=Path(folder))
    sys.exit(sum(row.status != "done" for row in content.trials))
