"""Pre-training under a launcher: the ranks share one run and one budget."""

from __future__ import annotations

import subprocess
import sys

import pytest
from safetensors.torch import load_file

from mixcl_dist.run import read_json, read_metrics

from ..conftest import SMALL

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_make_one_run_that_can_be_resumed(shards, tmp_path, stage):
    run = tmp_path / "run"
    settings = SMALL | {"pretrain.steps": 2, "engine.zero_stage": stage, "budget.fraction": 0.5}
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 --no-python".split()
    # `--` keeps torchrun from taking --run for one of its own options.
    pretrain = [*torchrun, "--", sys.executable, "-m", "mixcl_dist", "pretrain", "--data", shards, "--run", run]
    done = subprocess.run([*pretrain, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [entry["step"] for entry in read_metrics(run / "metrics.jsonl")] == [1, 2]
    assert read_json(run / "run.json")["finished"]
    assert all(weights.numel() for weights in load_file(run / "network.safetensors").values())

    again = subprocess.run([*pretrain, "--resume", "latest"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert [entry["step"] for entry in read_metrics(run / "metrics.jsonl")] == [1, 2]
