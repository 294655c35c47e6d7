"""A pre-training of two ranks in a real SLURM ends with the same weights, whatever happens to its job."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixcl_dist.cluster.launch.job import Job
from mixcl_dist.cluster.launch.slurm import Allocation, script, submit
from mixcl_dist.records import METRICS, PretrainRecord, read_metrics

from .conftest import SETTINGS, STEPS, Slurm, digest_of_weights

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture
def submitted(slurm, shards, tmp_path, monkeypatch):
    """Submits the job of a run in this test's folder; its number."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)

    def submitted(run: Path, warning_s: int = 120) -> str:
        command = ("pretrain", "--data", str(shards), "--run", str(run), *SETTINGS)
        return submit(script(Job(command, nodes=2), Allocation(time="10", warning_s=warning_s)), tmp_path)

    return submitted


def wait_for_step(run: Path, step: int, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not ((run / METRICS).exists() and (logged := read_metrics(run / METRICS)) and logged[-1]["step"] >= step):
        assert time.monotonic() < end, f"{run} does not come to step {step}"
        time.sleep(0.2)


def log(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.glob("*.log"))


def test_ranks_that_srun_starts_by_themselves_are_one_group(slurm: Slurm, shards, undisturbed, tmp_path):
    run = tmp_path / "run"
    pretrain = [sys.executable, "-m", "mixcl_dist", "pretrain", "--data", str(shards), "--run", str(run), *SETTINGS]
    srun = ["srun", "--nodes=2", "--ntasks=2", "--time=5", *pretrain]
    done = subprocess.run(srun, env=slurm.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pre-trained network in") == 1, "rank 0 alone speaks"
    assert digest_of_weights(run) == undisturbed


def test_a_job_comes_to_the_same_weights_whatever_happens_to_it(slurm: Slurm, submitted, undisturbed, tmp_path):
    run = tmp_path / "run"
    number = submitted(run)

    wait_for_step(run, 15)
    slurm.ask("scontrol", "requeue", number)
    slurm.wait(number, "RUNNING", seconds=90)

    wait_for_step(run, 40)
    slurm.kill_node("n2")  # it stays away: what SLURM still has to tell it would be told to the job's next turn
    slurm.wait(number, "PENDING", *ENDED, seconds=120)
    slurm.wait(number, "RUNNING", *ENDED, seconds=90)

    wait_for_step(run, 70)
    with slurm.paused(str(run)):  # the rest would else be done before SLURM looks at its clock, every half minute
        limit = slurm.run_time_s(number) // 60 + 2  # minutes; so near the end it tells the ranks to save
        slurm.ask("scontrol", "update", f"JobId={number}", f"TimeLimit={limit}")
        time.sleep(35)
    assert slurm.wait(number, *ENDED, seconds=400) == "COMPLETED", log(tmp_path)
    assert log(tmp_path).count("go on with --resume latest") == 2, "it was told to stop twice, and lost a rank once"

    assert digest_of_weights(run) == undisturbed
    assert PretrainRecord.load(run).world_size == 2
    assert [entry["step"] for entry in read_metrics(run / METRICS)] == list(range(1, STEPS + 1))
