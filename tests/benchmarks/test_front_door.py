"""Every benchmark by name, through one door."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixcl_dist.profiling.result import Result

ROOT = Path(__file__).resolve().parents[2]


def front_door(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.slow
def test_every_benchmark_is_listed_and_what_is_listed_is_there():
    listed = front_door("list").stdout
    assert {line.split()[0] for line in listed.splitlines()} >= {"kernel", "stream", "step", "shards", "launches"}
    for line in listed.splitlines():
        if "(benchmarks/" in line:
            assert (ROOT / line[line.rindex("(") + 1 : -1]).is_file()


@pytest.mark.slow
def test_a_step_of_a_phantom_is_measured_and_compared(tmp_path):
    out = tmp_path / "step.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = front_door("step", "--quick", "--out", str(out), env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    read = Result.read(out)
    assert read.benchmark == "step" and read.quick and len(read.figures["forward"].samples) == 3
    assert "Most is lost in" in read.said and out.with_suffix(".html").exists()
    again = front_door("compare", str(out), str(out))
    assert again.returncode == 0 and "worse" not in again.stdout
