"""Folders of few-label tables whose trials have ended, without any training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mixcl_dist.config import from_dict, to_dict, to_yaml
from mixcl_dist.jsonfiles import write_json
from mixcl_dist.studies.ledger import Ledger
from mixcl_dist.studies.table.plan import Item, plan

FINISHED = {"kind": "finetune", "name": "trial", "finished": "2026-01-01T10:00:00+00:00"}
CLASSES = ["brainstem", "larynx", "esophagus"]
CASES = [f"v{k}" for k in range(12)]
GAIN = {"scratch": 0.0, "mixcl": 0.3, "reconstruction": 0.0}
SECTION = {
    "scans": [1, 4],
    "seeds": [0, 1, 2, 3, 4],
    "stages": {"reconstruction": {}, "identity": {}, "mixcl": {"start": "identity", "labels": "budget"}},
    "arms": {"scratch": {}, "mixcl": {"stage": "mixcl"}, "reconstruction": {"stage": "reconstruction"}},
    "compared": [["mixcl", "reconstruction"]],
    "resamples": 500,
}


def dice_of(arm: str, scans: int, seed: int) -> dict:
    """Dice of a trial: the esophagus is contoured in a few cases, and not learnt from scratch by some seeds."""
    rng = np.random.default_rng([scans, seed])
    scores = 0.2 + 0.05 * scans + rng.normal(0, 0.03) + rng.normal(0, 0.05, (len(CASES), len(CLASSES)))
    scores += GAIN[arm] + np.random.default_rng([seed, len(arm)]).normal(0, 0.01, scores.shape)
    if arm == "scratch" and seed % 2:
        scores[:, 2] = 0.0
    found = {
        case: {name: None if name == "esophagus" and k % 3 else float(row[i]) for i, name in enumerate(CLASSES)}
        for k, (case, row) in enumerate(zip(CASES, scores, strict=True))
    }
    means = {name: float(np.mean([row[name] for row in found.values() if row[name] is not None])) for name in CLASSES}
    summary = {"classes": CLASSES, "cases": found, "class_mean": means, "mean": float(np.mean(list(means.values())))}
    other = {name: dict.fromkeys(CLASSES, value) for name, value in (("hd95_mm", 12.5), ("surface_dice", 0.7))}
    return summary | {name: {"class_mean": values} for name, values in other.items()}


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def planned(item):
    return dataclasses.asdict(item) | {"digest": digest(item.name)}


def write_table(
    folder: Path,
    done: Callable[[Item], bool] = lambda item: True,
    section: dict = SECTION,
    status: Callable[[Item], str | None] = lambda item: None,
) -> Path:
    """A table of which the trials that `done` accepts are done."""
    config = from_dict({"table": section})
    items = plan(config)
    facts = {
        "kind": "table",
        "name": "few labels",
        "started": "2026-01-01T10:00:00+00:00",
        "data": "ct",
        "shards": "s",
    }
    facts |= {"digest": "0", "table": to_dict(config)["table"], "items": [planned(i) for i in items.values()]}
    folder.mkdir(exist_ok=True)
    write_json(folder / "plan.json", facts)
    (folder / "config.yaml").write_text(to_yaml(config))
    ledger = Ledger(folder / "ledger.jsonl")
    machine = {"cpu": "a processor", "gpu": None, "cores": 2}
    for item in items.values():
        how = {"seconds": 60.0, "steps": 100, "machine": machine}
        if item.kind == "probe":
            ledger.add(
                item.name,
                digest(item.name),
                "done",
                linear=0.5 if "mixcl" in item.name else 0.2,
                knn=0.1,
                text="",
                **how,
            )
        elif item.kind == "trial" and status(item):
            ledger.add(
                item.name,
                digest(item.name),
                status(item),
                text=f"barred: {item.name} 0.210 is not 0.02 above",
                **how,
            )
        elif item.kind == "trial" and done(item):
            run = folder / item.name
            run.mkdir(parents=True, exist_ok=True)
            write_json(run / "dice.json", dice_of(item.arm, item.scans, item.seed))
            write_json(run / "run.json", FINISHED | {"label_cases": ["t0"] * item.scans})
            # Scratch reaches 0.5 at step 300 and stays there; mixcl is three times as fast.
            fast = 3 if item.arm == "mixcl" else 1
            curve = [{"step": s, "mean": min(0.5, 0.5 * s * fast / 300), "dice": {}} for s in range(100, 1300, 100)]
            (run / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
            ledger.add(item.name, digest(item.name), "done", mean=0.5, text="Dice 0.5", **how)
    return folder
