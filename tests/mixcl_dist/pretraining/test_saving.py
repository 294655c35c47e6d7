"""No step is lost: a run that is killed at any moment, again and again, ends with the weights of one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixcl_dist.cluster import checkpoint
from mixcl_dist.config import load
from mixcl_dist.networks.heads import PretrainNetwork
from mixcl_dist.records import read_metrics

from ...ports import free_port
from ..conftest import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLED = Path(__file__).with_name("killed.py")
STEPS = 150
SETTINGS = SMALL | {
    "pretrain.steps": STEPS, "pretrain.log_every": 1, "pretrain.sample_every": 1000, "pretrain.gradient_norms_every": 0,
    "checkpoint.every": 1, "budget.fraction": 0.5, "data.workers": 0, "data.labelled_fraction": 0.5,
}  # fmt: skip


def words(shards, run, **settings) -> list[str]:
    options = [word for key, value in (SETTINGS | settings).items() for word in (f"--{key}", str(value))]
    return ["pretrain", "--data", str(shards), "--run", str(run), *options]


def killed(shards, run, *, ranks: str, kills: int, **settings) -> dict[str, int]:
    """Kills by what they hit."""
    command = [sys.executable, KILLED, ranks, str(kills), "4", "--", *words(shards, run, **settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_random_kills_change_no_bit_of_the_weights(shards, tmp_path, ranks):
    """While steps are taken and while they are saved; of two ranks the first, the second, or both."""
    runs = whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    assert killed(shards, whole, ranks=str(ranks), kills=0) == {}
    kills = killed(shards, interrupted, ranks=str(ranks), kills=20)
    print(kills)
    assert kills.pop("while saving") >= 10
    assert sum(kills.values()) == 20 and all(kills.values()) and len(kills) == ranks
    expected, weights = (load_file(run / "pretrain.safetensors") for run in runs)
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    expected, losses = (
        [(entry["step"], entry["loss"]) for entry in read_metrics(run / "metrics.jsonl")] for run in runs
    )
    assert losses == expected and len(losses) == STEPS


def test_a_run_that_goes_on_at_other_ranks_learns_the_same(shards, tmp_path):
    """Sums are in another order, which the next steps amplify: weights within 1 % of what a few small steps change."""
    runs = whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    few = {"pretrain.steps": 20, "optimizer.learning_rate": 1e-4}
    killed(shards, whole, ranks="1", kills=0, **few)
    killed(shards, interrupted, ranks="1,2", kills=2, **few)
    torch.manual_seed(0)
    first = PretrainNetwork(load(overrides=list(SMALL.items())).network).state_dict()
    expected, weights = (load_file(run / "pretrain.safetensors") for run in runs)
    learnt = sum((expected[name] - first[name]).square().sum() for name in first).sqrt()
    apart = sum((expected[name] - weights[name]).square().sum() for name in first).sqrt()
    print(f"{apart / learnt:.2e} of what was learnt")
    assert 0 < apart < 0.01 * learnt


def test_a_full_disk_ends_all_ranks_with_one_line_and_leaves_the_last_good_checkpoint(shards, tmp_path):
    """A small tmpfs in a name space of its own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user name space to mount a small disk in; sysctl kernel.unprivileged_userns_clone=1")
    disk, settings = tmp_path / "disk", {"checkpoint.keep": 1000, "pretrain.log_every": 1000}
    disk.mkdir()
    command = " ".join([sys.executable, "-m", "mixcl_dist", *words(shards, disk / "run", **settings)])
    group = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()} WORLD_SIZE=2 OMP_NUM_THREADS=1"
    shell = f"""
        mount -t tmpfs -o size=2m tmpfs {disk}
        ({group} RANK=1 LOCAL_RANK=1 {command} 2> {tmp_path}/error1; echo $? > {tmp_path}/code1) &
        {group} RANK=0 LOCAL_RANK=0 {command} 2> {tmp_path}/error0; echo $? > {tmp_path}/code0
        wait
        cp -r {disk}/run {tmp_path}/run
    """
    done = subprocess.run(["unshare", "-rm", "sh", "-c", shell], capture_output=True, text=True, timeout=500)
    said = [[line for line in (tmp_path / f"error{rank}").read_text().splitlines() if line.startswith("mixcl:")]
            for rank in (0, 1)]  # fmt: skip
    assert [(tmp_path / f"code{rank}").read_text().strip() for rank in (0, 1)] == ["2", "2"], (done, said)
    assert said[1] == [] and len(said[0]) == 1
    step = checkpoint.read_state(checkpoint.newest(tmp_path / "run" / "checkpoints"))["step"]
    expected = f"mixcl: {disk}/run/checkpoints: step {step + 1} could not be saved, which needs "
    assert said[0][0].startswith(expected) and "No space left on device; make room there, then go on" in said[0][0]
