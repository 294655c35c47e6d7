"""Every Triton kernel of the tuning table, built ahead of time by benchmarks/kernel/builds.py: no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel" / "builds.py"), "--only", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "hip"])
def test_the_usual_build_uses_tensor_cores_and_spills_nothing(architecture, kernel):
    run = build(architecture, kernel, "bf16", "128", "narrow")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 builds" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "hip"])
def test_no_build_of_the_table_spills_or_has_grown(architecture):
    run = build(architecture)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_word_that_no_entry_has_is_refused():
    run = build("sm_75")
    assert run.returncode == 2 and "--only sm_75: no entry of the tuning table" in run.stderr
