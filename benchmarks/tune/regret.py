"""What did stopping trials early cost a search: the Dice of the best trial that it kept, beside the best of all.

    mixcl tune --data openkbp/dataset.json --from none --study FULL --config benchmarks/tune/search.yaml \
        --study.stopping none --trials.concurrent 2
    python benchmarks/tune/regret.py --stopped benchmarks/results/tune/search.json --full FULL --out OUT

`--stopped` is what `mixcl report` left of the search in which trials were stopped, `--full` the study in which the same
points ran to their end, or as far as it is. A trial is the same in both until it is stopped: its Dice there is sought
in the curve of the whole one. Then the same rule goes over the whole curves again, with later first looks. Results are
in ``regret.json``, with all curves, and ``regret.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SAME = 1e-6
"""Difference of two Dice up to which they are of one network."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stopped", type=Path, required=True)
    parser.add_argument("--full", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    told = json.loads(options.stopped.read_text())["trials"]
    found = compared({row["id"]: row for row in told if row["class"] == "mean"}, *whole(options.full))
    (options.out / "regret.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "regret.md").write_text(summary(found))
    print(summary(found))


def whole(study: Path) -> tuple[dict[str, dict[str, Any]], int, str]:
    """Trials of the full study, each with its curve and its Dice in the end; the steps of one; the machine."""
    from mixcl_dist.records import StudyRecord
    from mixcl_dist.studies.watching import standing

    record = StudyRecord.load(study)
    trials = {
        row.id: {"params": row.params, "dice": row.mean, "seconds": row.seconds, "curve": row.reports}
        for row in standing(study).rows
        if row.status == "done"
    }
    machine = record.machine
    where = f"{machine.cpu}, {machine.cores} cores, {machine.memory_gb} GB" if machine else "not known"
    return trials, record.config["finetune"]["steps"], where


def compared(stopped: dict[str, Any], full: dict[str, Any], steps: int, machine: str) -> dict[str, Any]:
    """Of the trials that have run to their end: all, or those that a full study which is not finished has."""
    taken = {name: _steps_of(stopped[name], trial, steps) for name, trial in full.items()}
    kept = {name: row["dice"] for name, row in stopped.items() if row["status"] == "done"}
    ends = kept | {name: trial["dice"] for name, trial in full.items()}
    chosen, best = (max(of, key=lambda name: of[name]) for of in (kept, ends))
    other = [name for name, at in taken.items() if at is None]
    return {
        "machine": machine,
        "steps": steps,
        "trials": len(stopped),
        "whole": len(ends),
        "kept": len(kept),
        "looked_up": len(full),
        "other": other,
        "chosen": chosen,
        "chosen_dice": kept[chosen],
        "best": best,
        "best_dice": ends[best],
        "regret": ends[best] - kept[chosen],
        "better": sum(dice > kept[chosen] for dice in ends.values()),
        "replayed": [replayed(list(full.values()), grace, steps) for grace in _looks(full, steps)],
        "curves": full,
    }


def _steps_of(row: dict[str, Any], trial: dict[str, Any], steps: int) -> int | None:
    """After how many steps a trial was stopped; None where it was another one."""
    if row["status"] == "done":
        return steps if abs(row["dice"] - trial["dice"]) < SAME else None
    return next((step for step, dice in trial["curve"] if abs(dice - row["dice"]) < SAME), None)


def _looks(full: dict[str, Any], steps: int) -> list[int]:
    return [step for step, _ in next(iter(full.values()))["curve"] if step < steps]


def replayed(trials: list[dict[str, Any]], grace: int, steps: int) -> dict[str, Any]:
    """What ASHA would have kept of the trials, one after the other, had it looked from `grace` steps on."""
    from mixcl_dist.cluster.trials import EarlyStopping

    rule = EarlyStopping("asha", "dice", longest=steps, grace=grace).scheduler()
    spent, kept = 0, []
    for number, trial in enumerate(trials):
        rule.on_trial_add(None, named := argparse.Namespace(trial_id=str(number)))
        for step, dice in trial["curve"]:
            if rule.on_trial_result(None, named, {"step": step, "dice": dice}) == "STOP":
                spent += step
                break
        else:
            spent += steps
            kept.append(trial["dice"])
    best = max(trial["dice"] for trial in trials)
    saved = 1 - spent / (steps * len(trials))
    return {"grace": grace, "kept": len(kept), "steps_saved": saved, "regret": best - max(kept)}


def summary(found: dict[str, Any]) -> str:
    partly = found["whole"] < found["trials"]
    whole = f"{found['whole']} of the {found['trials']} points" if partly else f"all {found['trials']} points"
    lines = [
        f"ASHA kept {found['kept']} of {found['trials']} trials and chose {found['chosen']}, Dice "
        f"{found['chosen_dice']:.3f}. Run for all {found['steps']} steps, {whole}: {found['better']} are better, the "
        f"best is {found['best']}, Dice {found['best_dice']:.3f}. Regret: {'at least ' * partly}{found['regret']:.3f}. "
        f"{found['looked_up'] - len(found['other'])} of {found['looked_up']} trials that were run again had the same "
        f"Dice until they were stopped. Machine: {found['machine']}.",
        "",
        f"The same rule over the {found['looked_up']} whole curves, one trial after the other:",
        "",
        "| first look at step | trials kept | steps saved | regret |",
        "|---|---|---|---|",
    ]
    for one in found["replayed"]:
        lines.append(f"| {one['grace']} | {one['kept']} | {one['steps_saved']:.0%} | {one['regret']:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
