"""Which implementation takes a tensor, and why another does not."""

from __future__ import annotations

import logging

import pytest
import torch

from mixcl_dist.kernels import mixed_contrastive_loss
from mixcl_dist.kernels.implementation import choose, obstacle


def test_refusals_say_why():
    cpu = torch.device("cpu")
    assert "float64" in obstacle(cpu, torch.float64, 128)
    assert "at most 1024 features, not 1025" in obstacle(cpu, torch.float32, 1025)
    with pytest.raises(ValueError, match=r'implementation: "triton" takes .* not torch.float64; "auto" takes'):
        choose("triton", torch.zeros(4, 4, dtype=torch.float64))


def test_a_cpu_tensor_is_refused_outside_of_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match='implementation: "triton" needs a GPU, not a cpu tensor'):
        mixed_contrastive_loss(
            torch.eye(4),
            torch.arange(4) // 2,
            torch.zeros(4, dtype=torch.long),
            torch.ones(1, 1, dtype=torch.bool),
            implementation="triton",
        )


def test_auto_falls_back_with_one_line(caplog):
    tensor = torch.zeros(4, 2000, device="meta")
    with caplog.at_level(logging.WARNING):
        assert [choose("auto", tensor), choose("auto", tensor)] == ["tiled", "tiled"]
    assert [record.getMessage() for record in caplog.records] == [
        'the mixed contrastive loss runs as plain PyTorch, as "triton" takes at most 1024 features, not 2000'
    ]
