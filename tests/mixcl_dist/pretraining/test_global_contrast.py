"""One batch over several processes is one batch: the same loss, the same weights, whatever ZeRO scatters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mixcl_dist.records import read_metrics

from ..conftest import SMALL

pytestmark = pytest.mark.slow

PROGRAM = """
from mixcl_dist import precision
from mixcl_dist.cli import command
precision.has_bfloat16 = lambda device: False  # whose rounding depends on how many patches are convolved at once
command()
"""
STEPS = 4
TERMS = ("loss", "voxel_identity", "voxel_label", "voxel_label_anchors", "crop_identity", "reconstruction")


@pytest.fixture(scope="module")
def real_shards(ct, tmp_path_factory) -> Path:
    """Shards of four scans of OpenKBP."""
    folder = tmp_path_factory.mktemp("real")
    content = json.loads((ct / "openkbp" / "dataset.json").read_text())
    entries = [
        entry | {key: str(ct / "openkbp" / entry[key]) for key in ("image", "label")}
        for entry in content["training"][:4]
    ]
    (folder / "dataset.json").write_text(json.dumps(content | {"training": entries, "validation": []}))
    settings = ["--build.patch_size", "24,24,24", "--build.spacing_mm", "6,6,6"]
    build = [sys.executable, "-m", "mixcl_dist", "shards", "build", folder / "dataset.json", "--out", folder / "shards"]
    subprocess.run([*build, *settings], check=True, capture_output=True)
    return folder / "shards"


def trained(shards: Path, run: Path, ranks: int, stage: int, contrast: str = "global") -> tuple[list[dict], np.ndarray]:
    """Logged terms, and all weights as one vector."""
    settings = SMALL | {"pretrain.steps": STEPS, "budget.fraction": 0.5, "data.labelled_fraction": 0.5}
    settings |= {"engine.zero_stage": stage, "objective.contrast": contrast, "pretrain.gradient_norms_every": 0}
    settings |= {"rows.per_view_pair": 128, "rows.min_spacing": 1}
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launcher = [*torchrun, "--no-python", "--"] if ranks > 1 else []
    pretrain = [*launcher, sys.executable, "-c", PROGRAM, "pretrain", "--data", shards, "--run", run, *options]
    done = subprocess.run(pretrain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights = load_file(run / "pretrain.safetensors")
    return read_metrics(run / "metrics.jsonl"), torch.cat([weights[name].flatten() for name in sorted(weights)]).numpy()


@pytest.fixture(scope="module")
def alone(real_shards, tmp_path_factory) -> tuple[list[dict], np.ndarray]:
    return trained(real_shards, tmp_path_factory.mktemp("alone") / "run", ranks=1, stage=0)


@pytest.mark.parametrize(("ranks", "stage"), [(2, 0), (2, 1), (2, 2), (2, 3), (4, 1)])
def test_several_ranks_learn_what_one_learns(real_shards, alone, tmp_path, ranks, stage):
    """Terms within 1e-4 of each other and weights within 1 % of what one step changes: sums are in another order."""
    metrics, weights = trained(real_shards, tmp_path / "run", ranks, stage)
    for entry, expected in zip(metrics, alone[0], strict=True):
        one, other = ({term: of[term] for term in TERMS if term in of} for of in (entry, expected))
        assert one == pytest.approx(other, rel=1e-4), entry["step"]
    assert any(entry["voxel_label_anchors"] for entry in metrics)
    one_step = 1e-3 * np.sqrt(weights.size) / STEPS
    assert np.linalg.norm(weights - alone[1]) < 0.01 * one_step * STEPS


def test_a_rank_by_itself_has_fewer_rows_to_contrast_with(real_shards, alone, tmp_path):
    metrics, _ = trained(real_shards, tmp_path / "run", ranks=2, stage=1, contrast="rank")
    assert metrics[0]["voxel_identity"] < 0.95 * alone[0][0]["voxel_identity"]
