"""The benchmark of a study's driver runs from end to end and says what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/tune/run.py", "--out", tmp_path, "--trials", "4", "--seconds", "0"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["runs"]) == {"study", "tuner", "reusing"}
    assert all([point[0] for point in runs[0]["curve"]] == [1, 2, 3, 4] for runs in found["runs"].values())
    assert "Overhead of `run_trials` beside `Tuner`" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "overhead.png").stat().st_size > 1000
