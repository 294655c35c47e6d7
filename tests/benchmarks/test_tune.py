"""The benchmark of a study's driver runs from end to end and says what it measured."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def regret():
    spec = importlib.util.spec_from_file_location("regret", ROOT / "benchmarks/tune/regret.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/tune/run.py", "--out", tmp_path, "--trials", "4", "--seconds", "0"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["runs"]) == {"study", "tuner", "reusing"}
    assert all([point[0] for point in runs[0]["curve"]] == [1, 2, 3, 4] for runs in found["runs"].values())
    assert "Overhead of a study beside that of Tuner, best runs" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "overhead.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_books_of_a_study_are_measured(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/tune/books.py", "--out", tmp_path, "--trials", "10", "20"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    sizes = json.loads((tmp_path / "books.json").read_text())["sizes"]
    assert [size["trials"] for size in sizes] == [10, 20] and sizes[1]["ledger_mb"] > sizes[0]["ledger_mb"]
    assert "| 20 |" in (tmp_path / "books.md").read_text() and (tmp_path / "books.png").stat().st_size > 1000


def test_regret_is_of_the_best_that_is_known_and_tells_a_trial_that_is_another(regret):
    curve = [(10, 0.1), (20, 0.2), (30, 0.6)]
    full = {
        "kept": {"dice": 0.5, "curve": [(10, 0.3), (20, 0.4), (30, 0.5)]},
        "late": {"dice": 0.6, "curve": curve},
        "other": {"dice": 0.2, "curve": curve},
    }
    stopped = {
        "kept": {"status": "done", "dice": 0.5},
        "late": {"status": "stopped", "dice": 0.2},
        "other": {"status": "stopped", "dice": 0.25},
        "unknown": {"status": "stopped", "dice": 0.0},
    }
    found = regret.compared(stopped, full, 30, "a machine")
    assert (found["chosen"], found["best"], found["better"]) == ("kept", "late", 1)
    assert found["regret"] == pytest.approx(0.1) and found["other"] == ["other"]
    assert [(one["grace"], one["kept"], one["regret"]) for one in found["replayed"]] == [
        (10, 1, 0.6 - 0.5),
        (20, 1, 0.6 - 0.5),
    ]
    assert "Regret: at least 0.100. 2 of 3 trials" in regret.summary(found)
