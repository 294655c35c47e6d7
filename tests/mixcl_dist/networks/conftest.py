"""What all tests of the networks have in common."""

from __future__ import annotations

import pytest
import torch

from mixcl_dist import precision


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """On every machine alike; tests of bfloat16 switch it on."""
    answer = torch.compiler.assume_constant_result(lambda device: False)
    monkeypatch.setattr(precision, "has_bfloat16", answer)
