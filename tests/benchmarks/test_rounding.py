"""Rows in bfloat16 are accurate enough to learn from; those in float32 are nearly exact."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "kernel"


@pytest.mark.parametrize(
    ("dtype", "loss_error", "gradient_error"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-3, 1e-2)]
)
def test_rounding_of_half_trained_rows(monkeypatch, dtype, loss_error, gradient_error):
    monkeypatch.syspath_prepend(FOLDER)
    rounding, inputs = import_module("rounding"), import_module("inputs")
    for name in ("rounding", "inputs"):
        monkeypatch.delitem(sys.modules, name)
    rows = inputs.make_rows("realistic", 512, 64, torch.float32, torch.device("cpu"))
    loss, gradient = rounding.errors(rows, dtype)
    assert loss < loss_error and gradient < gradient_error
    if dtype == torch.bfloat16:
        assert gradient > 1e-4  # rounding is really there
