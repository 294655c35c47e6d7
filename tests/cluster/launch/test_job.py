"""One line of sh begins a run, and the same line goes on with it."""

from __future__ import annotations

import subprocess

import pytest

from mixcl_dist.cluster.launch.job import Job, LaunchError, torchrun

COMMAND = ("pretrain", "--data", "shards", "--run", "runs/a b")


def test_a_line_begins_a_run_and_goes_on_with_it(tmp_path):
    run = tmp_path / "it's $HOME"
    job = Job(("pretrain", f"--run={run}"))
    line = job.shell(["printf", "%s\n", "a b", "$HOME"])
    said = [subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout]
    run.mkdir()
    (run / "run.json").touch()
    said.append(subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout)
    assert said == ["a b\n$HOME\n", "a b\n$HOME\n--resume\nlatest\n"]


def test_the_doctor_goes_on_with_nothing():
    job = Job(("doctor", "--cluster"))
    assert job.shell(["printf", "a b"]) == "exec printf 'a b'" and job.name == "mixcl-doctor"


def test_each_node_starts_its_processes_and_knows_its_place():
    command = torchrun(Job(COMMAND, nodes=2, processes=3), ["--nnodes=2", "--node-rank=1"], python="py")
    assert command[:4] == ["py", "-m", "torch.distributed.run", "--nproc-per-node=3"]
    assert command[4:] == ["--nnodes=2", "--node-rank=1", "--no-python", "--", "py", "-m", "mixcl_dist", *COMMAND]


@pytest.mark.parametrize(
    ("command", "size", "told"),
    [
        ((), {}, "nothing to run; give a command behind --"),
        (("tune", "--data", "x"), {}, "tune is no distributed command"),
        (("doctor",), {}, "doctor is no distributed command; give -- pretrain …, or -- doctor --cluster"),
        ((*COMMAND, "--resume", "latest"), {}, "leave out --resume"),
        (COMMAND, {"gpus": 8, "processes": 4}, "4 processes for 8 GPUs of a node; each process takes one GPU"),
        (COMMAND, {"nodes": 0}, "nodes 0: at least 1"),
        (("pretrain", "--data", "x"), {}, "pretrain has no --run; give it behind --"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(command, size, told):
    with pytest.raises(LaunchError, match=told):
        _ = Job(command, **size).name
