"""What the script asks a site for, and, in a real SLURM, that a job that is told to stop is run to its end in turns."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from mixcl_dist.cluster.launch.job import REQUEUE, Job, LaunchError
from mixcl_dist.cluster.launch.slurm import Allocation, script, submit

JOB = Job(("pretrain", "--data", "sh ards", "--run", "runs/a"), nodes=2, processes=8, gpus=8, threads=12)


def test_the_script_asks_for_what_the_job_needs():
    text = script(JOB, Allocation(time="1-0", partition="gpu", account="ct", options=("--constraint=h100",)))
    asked = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--time=1-0"} <= asked
    assert {"--partition=gpu", "--account=ct", "--constraint=h100", "--signal=USR1@120", "--requeue"} <= asked
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_job_on_cpus_asks_for_no_gpu_and_a_container_is_the_steps():
    text = script(Job(JOB.command, nodes=2), Allocation(container="registry/mixcl:1"))
    assert "--gpus" not in text and "--time" not in text
    assert "srun --kill-on-bad-exit=0 --wait=60 --container-image=registry/mixcl:1 sh -c" in text


@pytest.mark.parametrize("wrong", [{"time": "soon"}, {"options": ("constraint=h100",)}])
def test_what_sbatch_would_not_understand_is_refused(wrong):
    with pytest.raises(LaunchError, match="give"):
        Allocation(**wrong)


def test_without_sbatch_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no sbatch here"):
        submit("#!/bin/bash", tmp_path)


PYTHON = """#!/bin/sh
# Stands in for `python -m mixcl_dist`: the first turn is told to stop, saves and asks for another. It does not come to
# that at another signal than {heeded}, as in a long step; rank 0 ends a second after the others.
trap '' USR1
echo "$SLURM_PROCID of $SLURM_NTASKS at $MASTER_ADDR:$MASTER_PORT: $@" >> {folder}/ranks
if [ -e {folder}/runs/a/run.json ]; then sleep 1; exit {code}; fi
trap 'touch {folder}/saved.$SLURM_PROCID; sleep $((SLURM_PROCID == 0)); exit {requeue}' {heeded}
touch {folder}/begun.$SLURM_PROCID
while true; do sleep 0.1; done
"""


def job(slurm, folder, monkeypatch, code: int, *, limit: str = "10", heeded: str = "USR1", saves: int = REQUEUE) -> str:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    python = folder / "python"
    python.write_text(PYTHON.format(folder=folder, code=code, requeue=saves, heeded=heeded))
    python.chmod(0o755)
    two = Job(("pretrain", "--data", "shards", "--run", str(folder / "runs" / "a")), nodes=2)
    return submit(script(two, Allocation(time=limit), python=str(python)), folder)


def wait_for(*paths, seconds: float = 60) -> None:
    wait = 'for f; do until [ -e "$f" ]; do sleep 0.1; done; done'
    subprocess.run(["sh", "-c", wait, "_", *paths], timeout=seconds)


@pytest.mark.cluster
def test_ranks_that_are_told_to_stop_get_another_turn(slurm, tmp_path, monkeypatch):
    number = job(slurm, tmp_path, monkeypatch, code=0)
    wait_for(tmp_path / "begun.0", tmp_path / "begun.1")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "run.json").touch()
    slurm.ask("scancel", "--signal=USR1", f"{number}.0")
    wait_for(tmp_path / "saved.0", tmp_path / "saved.1")
    assert slurm.wait(number, "COMPLETED", "FAILED", "CANCELLED", seconds=90) == "COMPLETED"
    said = sorted((tmp_path / "ranks").read_text().splitlines())
    assert [line.split()[0] for line in said] == ["0", "0", "1", "1"]
    assert len({line.split()[4] for line in said}) == 1, "all ranks meet in one place"
    assert sum(line.endswith("--resume latest") for line in said) == 2


@pytest.mark.cluster
def test_ranks_that_save_only_once_their_time_is_up_get_another_turn(slurm, tmp_path, monkeypatch):
    """SLURM then ends the script itself, too."""
    number = job(slurm, tmp_path, monkeypatch, code=0, limit="1", heeded="TERM")
    wait_for(tmp_path / "begun.0", tmp_path / "begun.1")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "run.json").touch()
    wait_for(tmp_path / "saved.0", tmp_path / "saved.1", seconds=240)  # SLURM looks at its clock every half minute
    slurm.wait(number, "PENDING", seconds=90)
    assert slurm.wait(number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=120) == "COMPLETED"


@pytest.mark.cluster
def test_ranks_that_have_saved_nothing_when_their_time_is_up_get_no_other_turn(slurm, tmp_path, monkeypatch):
    """Each turn would end so, as that of a run whose start takes longer than its limit."""
    number = job(slurm, tmp_path, monkeypatch, code=0, limit="1", heeded="TERM", saves=130)
    wait_for(tmp_path / "saved.0", tmp_path / "saved.1", seconds=240)
    assert slurm.wait(number, "COMPLETED", "FAILED", "CANCELLED", "PENDING", "TIMEOUT", seconds=120) == "TIMEOUT"
    time.sleep(5)  # a job that asked for another turn would be waiting by now
    assert slurm.state(number) == "TIMEOUT"


@pytest.mark.cluster
def test_a_cancelled_job_gets_no_other_turn(slurm, tmp_path, monkeypatch):
    number = job(slurm, tmp_path, monkeypatch, code=0, heeded="TERM")
    wait_for(tmp_path / "begun.0", tmp_path / "begun.1")
    slurm.ask("scancel", number)
    wait_for(tmp_path / "saved.0", tmp_path / "saved.1")
    assert slurm.wait(number, "COMPLETED", "FAILED", "CANCELLED", "PENDING", seconds=90) == "CANCELLED"
    time.sleep(5)  # a job that asked for another turn would be waiting by now
    assert slurm.state(number) == "CANCELLED"


@pytest.mark.cluster
def test_a_failure_of_another_kind_ends_the_job(slurm, tmp_path, monkeypatch):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "run.json").touch()
    number = job(slurm, tmp_path, monkeypatch, code=1)
    assert slurm.wait(number, "COMPLETED", "FAILED", "CANCELLED", seconds=60) == "FAILED"


@pytest.mark.cluster
def test_what_the_site_refuses_is_told_in_one_line(slurm, tmp_path, monkeypatch):
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"^sbatch: invalid partition specified: nowhere"):
        submit(script(Job(JOB.command), Allocation(partition="nowhere"), python=sys.executable), tmp_path)
