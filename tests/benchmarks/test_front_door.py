"""Every benchmark by name, through one door."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixcl_dist.profiling.result import Result

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def door():
    """The front door itself, as a module."""
    spec = importlib.util.spec_from_file_location("front_door", ROOT / "benchmarks" / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RESULTS = ROOT / "benchmarks" / "results"
COMMITTED = {
    "launches": (RESULTS, "views: launches", "launches"),
    "shards": (RESULTS / "shards", "ours, 48³", "volumes/min"),
    "stream": (RESULTS / "stream", "PatchStream, 2 workers, batch 32", "patches/s"),
    "views": (RESULTS / "views", "mixcl_dist, views, 48³ to 32³, cpu", "patches/s"),
}
"""Benchmark → a folder that it has written, a figure in it, and that figure's unit."""


@pytest.mark.parametrize("name", COMMITTED)
def test_what_a_benchmark_wrote_becomes_figures_with_every_sample(door, name):
    folder, figure, unit = COMMITTED[name]
    figures = door.BENCHMARKS[name].figures(folder)
    assert figures[figure].unit == unit
    assert all(one.samples and np.isfinite(one.samples).all() for one in figures.values())
    assert {len(one.samples) for one in figures.values()} == {len(figures[figure].samples)}


def test_a_study_of_overheads_becomes_figures(door, tmp_path):
    shutil.copy(RESULTS / "tune" / "results-40.json", tmp_path / "results.json")
    figures = door.BENCHMARKS["tune"].figures(tmp_path)
    assert figures["study: overhead_s"].samples == pytest.approx((0.026,), abs=1e-3)


@pytest.mark.slow
def test_predictions_of_scaling_are_compared_to_the_digit(tmp_path):
    out = tmp_path / "scaling.json"
    done = front_door("scaling", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = Result.read(out).figures
    assert all(one.exact and 0 < one.samples[0] <= 1 for one in figures.values())
    name = "Ethernet, 100 Gbit/s a node, 8,192 rows, ring, {} GPUs"
    assert figures[name.format(8)].samples > figures[name.format(1024)].samples


def test_a_kernel_s_figures_are_its_laps_and_not_their_summary(door, tmp_path):
    laps = {"forward": [1.0, 2.0, 3.0, 4.0], "backward": [2.0] * 4, "both": [3.0, 4.0, 5.0, 6.0]}
    row = {"kind": "timing", "mix": "realistic", "rows": 512, "width": 128, "dtype": "fp32", "laps_ms": laps}
    gate = {"kind": "gate", "case": "realistic", "rows": 512, "width": 128, "dtype": "fp32", "passed": True}
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(gate) + "\n")
    figures = door.BENCHMARKS["kernel"].figures(tmp_path)
    assert {name: one.samples for name, one in figures.items()} == {
        f"realistic 512 128 fp32: {name}": tuple(samples) for name, samples in laps.items()
    }


def front_door(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550, **options)


@pytest.mark.slow
def test_every_benchmark_is_listed_and_what_is_listed_is_there():
    listed = front_door("list").stdout
    names = {line.split()[0] for line in listed.splitlines() if "(benchmarks/" in line}
    assert names == {"kernel", "launches", "scaling", "shards", "step", "stream", "time_to_dice", "tune", "views"}
    for line in listed.splitlines():
        if "(benchmarks/" in line:
            assert (ROOT / line[line.rindex("(") + 1 : -1]).is_file()


@pytest.mark.slow
def test_no_stage_has_more_launches_waits_or_bytes_than_committed_and_no_kernel_more_instructions():
    """In processes of its own: what other tests leave alive decides whether autograd copies a gradient."""
    done = front_door("gate")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pre-training step" in done.stdout and "3 builds by triton" in done.stdout


@pytest.mark.parametrize(("codes", "ends"), [((0, 0), 0), ((1, 0), 1), ((0, 1), 1)])
def test_the_gate_fails_if_a_count_has_grown_and_looks_at_the_others_too(door, tmp_path, monkeypatch, codes, ends):
    programs = []
    for number, code in enumerate(codes):
        file = tmp_path / f"{number}.py"
        file.write_text(f"import sys; open({str(tmp_path / f'{number}.ran')!r}, 'w'); sys.exit({code})")
        programs.append((str(file),))
    monkeypatch.setattr(door, "GATES", tuple(programs))
    assert door.main(["gate"]) == ends
    assert all((tmp_path / f"{number}.ran").exists() for number in range(len(codes)))


@pytest.mark.slow
def test_a_step_of_a_phantom_is_measured_and_compared(tmp_path):
    out = tmp_path / "step.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = front_door("step", "--quick", "--out", str(out), env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    read = Result.read(out)
    assert read.benchmark == "step" and read.quick and len(read.figures["forward"].samples) == 3
    assert {"shards", "views.size", "pretrain.batch_size"} <= read.conditions.keys()
    assert "Most is lost in" in read.said and out.with_suffix(".html").exists()
    again = front_door("compare", str(out), str(out))
    assert again.returncode == 0 and "worse: none" in again.stdout
