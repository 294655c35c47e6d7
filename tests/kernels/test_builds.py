"""Every Triton kernel of the tuning table, built ahead of time by benchmarks/kernel/builds.py: no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "kernel"))
import builds


def build(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, builds.__file__, "--only", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "hip"])
def test_no_build_of_the_table_spills_or_has_grown(architecture):
    run = build(architecture)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_word_that_no_entry_has_is_refused():
    run = build("sm_75")
    assert run.returncode == 2 and "--only sm_75: no entry of the tuning table" in run.stderr


def test_a_longer_loop_than_the_committed_one_is_a_complaint():
    committed = builds.read_committed()
    assert set(committed) == set(builds.entries())
    for made in committed.values():
        assert not builds.complaints(made, committed)
        assert builds.complaints(made._replace(loop=made.loop * 2), committed)
