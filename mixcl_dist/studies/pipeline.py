"""The pre-trainings of a study's trials: one for all trials that share it, run before them."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixcl_dist.cluster import checkpoint
from mixcl_dist.config import Config, from_dict, replace, to_dict, to_yaml
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.errors import RunError
from mixcl_dist.jsonfiles import write_atomic
from mixcl_dist.pretraining.pretrain import check_batches, check_settings
from mixcl_dist.records import RunRecord
from mixcl_dist.studies.ledger import digest_of
from mixcl_dist.studies.search import SEARCHED
from mixcl_dist.studies.table import programs
from mixcl_dist.studies.table.runner import ROOT, SETTINGS, SOURCES, WITHOUT_EFFECT

FOLDER = "pretrainings"


@dataclass
class Pretrainings:
    """Those that have been asked for, each in a folder that is called by a digest of all that it depends on."""

    config: Config
    shards: Path
    study: Path
    manifest: Manifest
    runs: dict[str, Config] = field(default_factory=dict)

    def start(self, params: Mapping[str, Any], fraction: float, seed: int) -> Path:
        """The folder of the run that a trial starts from; raises `ConfigError` where it cannot be run.

        It reads the labels of the trial's own budget, or none where the label term has no weight: then it is one for
        all budgets.
        """
        own = replace(self.config, params)
        reads = bool(own.objective.voxel_label)
        own = replace(own, {"budget.fraction": fraction if reads else 0.0, "budget.scans": None})
        own = replace(own, {"budget.seed": seed if reads else 0})
        tree = to_dict(own)
        settings = [
            {key: value for key, value in tree[section].items() if key not in WITHOUT_EFFECT.get(section, ())}
            for section in SETTINGS["pretrain"]
        ]
        digest = digest_of(ROOT, SOURCES["pretrain"], settings, self.manifest.digest)
        if digest not in self.runs:
            check_settings(own, self.manifest)
            check_batches(own, self.shards, self.manifest)
            self.runs[digest] = own
        return self.study / FOLDER / digest

    def unfinished(self) -> list[dict[str, Any]]:
        """As trials of their own."""
        return [
            {"id": digest, "settings": to_dict(config)}
            for digest, config in self.runs.items()
            if not is_finished(self.study / FOLDER / digest)
        ]


def is_finished(run: Path) -> bool:
    record = RunRecord.load_if_there(run)
    return record is not None and record.finished is not None


def finetuning_part(params: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial from scratch reads of a point."""
    return {key: value for key, value in params.items() if not key.startswith(SEARCHED)}


def run_pretraining(
    study: Path, shards: Path, trial: dict[str, Any], report: Callable[[Mapping[str, float]], None]
) -> dict[str, Any]:
    """Pre-train, in a program of its own, from its newest checkpoint where there is one.

    Raises `RunError` with its last line where it fails.
    """
    run = study / FOLDER / trial["id"]
    if is_finished(run):
        return {}
    log, settings = run.with_suffix(".log"), run.with_suffix(".yaml")
    log.parent.mkdir(parents=True, exist_ok=True)
    config = from_dict(trial["settings"])
    often = min(config.checkpoint.every, math.ceil(config.pretrain.steps / 10))  # it may be ended at any time
    write_atomic(settings, to_yaml(replace(config, {"checkpoint.every": often})).encode())
    words = ["pretrain", "--config", str(settings), "--data", str(shards), "--run", str(run)]
    if checkpoint.newest(run / "checkpoints") is not None:
        words += ["--resume", "latest"]
    path = os.pathsep.join(filter(None, [str(ROOT.parent), os.environ.get("PYTHONPATH")]))
    with log.open("a", encoding="utf-8") as output:
        command = [sys.executable, "-m", "mixcl_dist", *words]
        process = programs.start(command, environment=os.environ | {"PYTHONPATH": path}, output=output)
    try:
        code = process.wait()
    finally:
        programs.kill(process)
    if code or not is_finished(run):
        raise RunError(programs.last_line(log) or f"exit code {code}, no output")
    return {}
