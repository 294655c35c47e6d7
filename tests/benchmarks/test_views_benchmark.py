"""The gate before views are timed finds what does something else, and the benchmark runs through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "benchmarks" / name for name in ("views", "stream")]
PATCH, VIEW = 36, 24


@pytest.fixture(scope="module")
def parts():
    """The modules `gate` and `contestants`, as their own program would import them."""
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(FOLDERS[0]))
    yield import_module("gate"), import_module("contestants")
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent in FOLDERS:
            del sys.modules[name]


@pytest.fixture
def patch() -> torch.Tensor:
    return torch.randint(-1000, 1000, (1, 1, PATCH, PATCH, PATCH), generator=torch.Generator().manual_seed(1)).short()


def made(kind):
    return partial(kind, PATCH, VIEW, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixcl_dist", "MONAI", "TorchIO", "batchgeneratorsv2"])
def test_what_is_compared_does_what_it_is_timed_for(parts, patch, name):
    gate, contestants = parts
    if name in ("TorchIO", "batchgeneratorsv2"):
        pytest.importorskip(name.lower(), reason=f"{name} is not installed; see benchmarks/views/environment.sh")
    assert gate.why_not(made(contestants.CONTESTANTS[name]), patch) is None


WRONG = {
    "crop": (lambda clean: clean.roll(1, dims=2), "off scipy's values at the same places"),
    "blur": (lambda degraded: degraded * 1.1, "a point's mass changes"),
    "low_resolution": (lambda degraded: degraded * 3, "of the power of noise is kept"),
    "noise": (lambda degraded: degraded * 2, "deviation is up to"),
    "shift": (lambda degraded: degraded * 1.5, "shifts are up to"),
    "mask": (lambda degraded: degraded.where(degraded != -1, 0.0), "of the voxels are masked"),
    "all": (lambda degraded: degraded * 2, "values lie beyond -1 and 1"),
}


@pytest.mark.parametrize("check", WRONG)
def test_what_does_something_else_is_named(parts, patch, check, monkeypatch):
    gate, contestants = parts
    spoil, why = WRONG[check]

    class Wrong(contestants.Ours):
        def __call__(self, patches):
            clean, degraded = super().__call__(patches)
            real = patches.float().std() > 400  # ramps are left alone, so that places are told as they should be
            return (spoil(clean) if check == "crop" and real else clean), spoil(degraded)

    monkeypatch.setattr(gate, "CHECKS", {check: gate.CHECKS[check]})
    assert why in gate.why_not(made(Wrong), patch)


def test_views_that_repeat_are_named(parts, patch, monkeypatch):
    gate, contestants = parts

    class Still(contestants.Ours):
        def __call__(self, patches):
            self._seed = 0
            return super().__call__(patches)

    monkeypatch.setattr(gate, "CHECKS", {"crop": gate.CHECKS["crop"]})
    assert "views lie at the same place" in gate.why_not(made(Still), patch)


@pytest.mark.slow
def test_a_quick_run_leaves_figures_and_names_what_is_left_out(tmp_path):
    command = [sys.executable, FOLDERS[0] / "run.py", "--quick", "--out", tmp_path, "--peers", tmp_path / "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {one["name"] for one in results["timings"]} >= {"mixcl_dist", "MONAI"}
    assert all(len(one["patches_per_second"]) == 3 for one in results["timings"])
    left_out = {one["name"]: one["why"] for one in results["left_out"]}
    assert {one["name"] for one in results["timings"]} | set(left_out) == {
        "mixcl_dist", "MONAI", "TorchIO", "batchgeneratorsv2",
    }  # fmt: skip
    assert all("No module named" in why for why in left_out.values())
    assert "A quick run: no figures to quote" in (tmp_path / "summary.md").read_text()
