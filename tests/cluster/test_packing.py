"""Trials share a GPU by what a few steps of one took of its memory; a machine without a GPU pretends here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from mixcl_dist.cluster.packing import GpuMemory

GB = 10**9


@pytest.mark.parametrize(
    ("peak", "beside", "trials"),
    [
        (7 * GB, GB // 2, 9),  # 80 / (1.1 * 7 + 0.5) = 9.8
        (30 * GB, GB, 2),
        (45 * GB, GB, 1),
        (79 * GB, GB, 1),  # it has run, so one does
    ],
)
def test_so_many_trials_share_a_gpu_as_it_holds(peak, beside, trials):
    assert GpuMemory(peak=peak, beside=beside, total=80 * GB).trials == trials


def test_the_shares_of_all_are_no_more_than_the_gpu_as_ray_counts():
    for trials in range(1, 200):
        memory = GpuMemory(peak=0, beside=80 * GB // trials, total=80 * GB)
        assert memory.trials == trials and memory.trials * round(memory.share * 10_000) <= 10_000


PROBING = """
import os, sys
from pathlib import Path
from mixcl_dist.cluster.packing import measure
from mixcl_dist.cluster.ray import RayError
from mixcl_dist.cluster.trials import TrialsConfig

folder = Path(sys.argv[1])

def step(trial, report):
    import torch

    (folder / trial["id"]).write_text(f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']}")
    report({"step": 1, "dice": 0.5})
    if trial.get("fails"):
        raise ValueError("no labels")
    if "peak" in trial:
        torch.cuda.is_available = lambda: True
        torch.cuda.max_memory_reserved = lambda: trial["peak"]
        torch.cuda.memory_reserved = lambda: 2
        torch.cuda.mem_get_info = lambda: (90, 100)
    return {}

def told(probes):
    try:
        return measure(step, probes, storage=folder / "tune", config=TrialsConfig(gpus="measured"))
    except RayError as error:
        return error

print(told([{"id": "small", "peak": 20}, {"id": "large", "peak": 30}]))
print(told([{"id": "idle"}]))
print(told([{"id": "bad", "fails": True}]))
"""


@pytest.mark.slow
def test_each_probe_has_a_gpu_and_a_process_to_itself_and_the_largest_counts(tmp_path):
    pretended = os.environ | {"RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": 1})}
    command = [sys.executable, "-c", textwrap.dedent(PROBING), str(tmp_path)]
    done = subprocess.run(command, env=pretended, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "GpuMemory(peak=30, beside=8, total=100)",
        "trials.gpus measured: a few steps of a trial took no memory of the GPU; give trials.gpus a share, as 0.5",
        "trials.gpus measured: a few steps of a trial failed: ValueError: no labels; give trials.gpus a share, as 0.5",
    ]
    (small, device), (large, other) = ((tmp_path / name).read_text().split() for name in ("small", "large"))
    assert small != large, "what the first holds would be missing to the second"
    assert device == other == "0"
