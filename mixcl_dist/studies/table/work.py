"""What one item of a table does, in a process of its own."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from mixcl_dist.config import Config, replace
from mixcl_dist.records import PlannedItem, PlanRecord
from mixcl_dist.run import read_config

FINISHED = {"pretrain": "network.safetensors", "supervised": "dice.json", "trial": "dice.json", "probe": "probe.json"}
"""The file that each kind leaves in its run's folder once it is done."""


def work(table: Path, name: str) -> None:
    """Do the item `name` of the table in the folder `table`, which `run_table` has begun.

    A pre-training goes on from its newest checkpoint; anything else begins anew.
    """
    plan = PlanRecord.load(table)
    item = next(item for item in plan.items if item.name == name)
    config = replace(read_config(table), item.settings)
    start = table / item.start if item.start else None
    kinds = {"pretrain": _pretrain, "supervised": _finetune, "trial": _finetune, "probe": _probe}
    kinds[item.kind](config, plan, item, start, table / name)


def _pretrain(config: Config, plan: PlanRecord, item: PlannedItem, start: Path | None, run: Path) -> None:
    from mixcl_dist.cluster import checkpoint
    from mixcl_dist.pretraining.pretrain import pretrain

    resume = checkpoint.newest(run / "checkpoints") is not None
    if resume:  # as it was begun: by the ledger's digest all that matters is the same
        config, start = read_config(run), None
    else:
        shutil.rmtree(run, ignore_errors=True)
        often = min(config.checkpoint.every, math.ceil(config.pretrain.steps / 10))  # a call may end at any time
        config = replace(config, {"checkpoint.every": often})
    pretrain(config, shards=plan.shards, run=run, start=start, resume=resume)


def _finetune(config: Config, plan: PlanRecord, item: PlannedItem, start: Path | None, run: Path) -> None:
    from mixcl_dist.finetuning.finetune import finetune

    shutil.rmtree(run, ignore_errors=True)
    finetune(config, data=Path(plan.data), start=start, run=run, final=item.kind == "trial" and config.table.final)


def _probe(config: Config, plan: PlanRecord, item: PlannedItem, start: Path | None, run: Path) -> None:
    from mixcl_dist.pretraining.probe import probe_run

    found = probe_run(start, config, shards=plan.shards)
    folder = start or run
    folder.mkdir(parents=True, exist_ok=True)
    found.save(folder)
