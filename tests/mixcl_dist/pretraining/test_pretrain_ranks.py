"""Pre-training under a launcher: the ranks share one run and one budget, and stop together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.records import PretrainRecord, read_metrics

from ...ports import free_port
from ..conftest import SMALL

pytestmark = pytest.mark.slow


def start(shards, run, *, ranks=2, settings=None, of_rank=None, resume=False, environment=None):
    """The ranks of one `mixcl pretrain`; `of_rank` are words for some of them, `environment` makes each one's."""
    options = [word for key, value in (SMALL | (settings or {})).items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "mixcl_dist", "pretrain", "--data", shards, "--run", run]
    command += ["--resume", "latest"] if resume else options
    described = environment or (lambda rank: {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks})
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [str(word) for word in [*command, *(of_rank or {}).get(rank, [])]],
            env=os.environ | common | {name: str(value) for name, value in described(rank).items()},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes, timeout=500):
    """Exit codes, and what was said on standard error, rank by rank."""
    try:
        said = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return [process.returncode for process in processes], said


def told_lines(said):
    """What each rank said as `mixcl`."""
    return [[line for line in text.splitlines() if line.startswith("mixcl:")] for text in said]


def last_lines(said):
    return [lines[-1] if lines else "" for lines in told_lines(said)]


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_make_one_run_that_can_be_resumed_by_one(shards, tmp_path, stage):
    run = tmp_path / "run"
    settings = {"pretrain.steps": 2, "engine.zero_stage": stage, "budget.fraction": 0.5, "checkpoint.every": 1}
    codes, said = finish(start(shards, run, settings=settings))
    assert codes == [0, 0], said
    assert [entry["step"] for entry in read_metrics(run / "metrics.jsonl")] == [1, 2]
    assert PretrainRecord.load(run).finished
    assert all(weights.numel() for weights in load_file(run / "network.safetensors").values())

    (run / "checkpoints" / "step_00000002" / "engine.safetensors").unlink()  # so that a step is left to do
    codes, said = finish(start(shards, run, ranks=1, resume=True))
    assert codes == [0], said
    assert [entry["step"] for entry in read_metrics(run / "metrics.jsonl")] == [1, 2]


def test_ranks_that_srun_started_join_without_torchrun(shards, tmp_path):
    def srun(rank):
        return {
            "SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_JOB_ID": 4711,
            "SLURM_STEP_ID": 0, "SLURM_STEP_NODELIST": "localhost",
        }  # fmt: skip

    codes, said = finish(start(shards, tmp_path / "run", settings={"pretrain.steps": 1}, environment=srun))
    assert codes == [0, 0], said


def test_one_process_that_torchrun_started_needs_nobody_else(shards, tmp_path):
    """As on what is left of two hosts."""
    options = [word for key, value in (SMALL | {"pretrain.steps": 1}).items() for word in (f"--{key}", str(value))]
    meeting = ["--nnodes=1", "--nproc-per-node=1", f"--master-port={free_port()}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting]
    pretrain = [sys.executable, "-m", "mixcl_dist", "pretrain", "--data", shards, "--run", tmp_path / "run", *options]
    command = [*torchrun, "--no-python", "--", *map(str, pretrain)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_two_first_processes_of_one_run_are_never_two_writers(shards, tmp_path):
    """As `srun -n 2` without its step's variables would start them: the second says so and touches nothing."""
    codes, said = finish(
        start(
            shards,
            tmp_path / "run",
            settings={"pretrain.steps": 1},
            environment=lambda rank: {"SLURM_NTASKS": 2, "SLURM_PROCID": rank},
        )
    )
    assert codes == [0, 2], said
    assert "SLURM_PROCID is 1, but SLURM_STEP_NUM_TASKS is not set" in last_lines(said)[1]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--optimizer.learning_rate", "0.5"], "optimizer.learning_rate (0.001 and 0.5)"),
        (["--budget.fraction", "0.5"], "budget.fraction (0.0 and 0.5)"),
        (["--engine.zero_stage", "3"], "engine.zero_stage (None and 3)"),
        (["--checkpoint.every", "1"], "checkpoint.every (200 and 1)"),
    ],
)
def test_ranks_with_other_settings_refuse_before_the_run_begins(shards, tmp_path, words, named):
    codes, said = finish(start(shards, tmp_path / "run", of_rank={1: words}))
    assert codes == [2, 2], said
    told, silent = told_lines(said)
    assert not silent and told[-1].startswith("mixcl: ranks 0 and 1 differ in ") and named in told[-1]
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_batch_that_the_ranks_cannot_share_is_told_by_rank_0_alone(shards, tmp_path):
    codes, said = finish(start(shards, tmp_path / "run", settings={"pretrain.batch_size": 3}))
    assert codes == [2, 2], said
    assert "pretrain.batch_size 3 is that of all ranks, and not a multiple of 2 ranks" in said[0] and not said[1]
    assert not (tmp_path / "run").exists()


def test_a_first_machine_that_nobody_knows_is_not_waited_for(shards, tmp_path):
    codes, said = finish(
        start(
            shards,
            tmp_path / "run",
            environment=lambda rank: {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "nowhere.invalid"
            },
        )
    )  # fmt: skip
    assert codes == [2, 2], said
    assert all("nowhere.invalid, the machine of rank 0, is not known here" in line for line in last_lines(said))


def test_a_port_that_is_taken_is_named(shards, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        described = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}
        codes, said = finish(start(shards, tmp_path / "run", ranks=1, environment=lambda _: described))
    assert codes == [2], said
    assert f"MASTER_PORT {port} is taken on this machine" in last_lines(said)[0]


def test_a_run_folder_that_is_not_shared_is_refused(shards, tmp_path):
    processes = start(shards, tmp_path / "one", of_rank={1: ["--run", str(tmp_path / "other")]})
    codes, said = finish(processes)
    assert codes == [2, 2], said
    told, silent = told_lines(said)
    assert not silent and "see different folders; give a --run that all machines share" in told[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_one_rank_that_is_asked_to_stop_stops_all_with_the_state_saved(shards, tmp_path, number):
    run = tmp_path / "run"
    processes = start(shards, run, settings={"pretrain.steps": 500, "checkpoint.every": 500})
    wait_for_steps(run, processes)
    processes[1].send_signal(number)
    codes, said = finish(processes)
    assert codes == [75, 75], said
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    told, silent = told_lines(said)
    assert len(saved) == 1 and not silent and f"saved at step {int(saved[0][5:])};" in told[-1]


def wait_for_steps(run, processes):
    while not (run / "metrics.jsonl").exists():
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.1)


def test_a_killed_rank_ends_the_other_long_before_its_time_out(shards, tmp_path):
    run = tmp_path / "run"
    processes = start(shards, run, settings={"pretrain.steps": 500, "engine.timeout_s": 3600})
    wait_for_steps(run, processes)
    processes[1].kill()
    codes, said = finish(processes)
    assert codes == [2, -signal.SIGKILL], said
    assert "mixcl: rank 1 on " in last_lines(said[:1])[0] and "has ended" in last_lines(said[:1])[0]


def test_bad_samples_are_counted_over_all_ranks(shards, tmp_path):
    """Each of two ranks meets no more than half of them."""
    damaged = tmp_path / "shards"
    damaged.mkdir()
    for path in shards.iterdir():
        if path.is_file():
            (damaged / path.name).write_bytes(path.read_bytes())
    population = Manifest.load(damaged).patches
    share = 0.75 * spoil(damaged, every=4) / population
    settings = {"pretrain.steps": population // 4, "data.max_bad_fraction": share, "data.workers": 0}
    codes, said = finish(start(damaged, tmp_path / "run", settings=settings))
    assert codes == [2, 2], said
    assert all("more than data.max_bad_fraction" in line for line in last_lines(said))


def spoil(folder, every):
    """Flip a byte in the image of every so-manieth sample; how many that is."""
    hit = 0
    for index in sorted(folder.glob("*.index.json")):
        samples = json.loads(index.read_text())["samples"]
        shard = folder / index.name.replace(".index.json", ".tar")
        content = bytearray(shard.read_bytes())
        for members in list(samples.values())[::every]:
            (offset,) = [member[0] for name, member in members.items() if name.startswith("ct.")]
            content[offset + 3] ^= 255
            hit += 1
        shard.write_bytes(content)
    return hit
