"""The loss of few rows by one program, held against the definition; the contract has more."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from mixcl_dist.kernels import fused, mixed_contrastive_loss, small

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Single classes, a set twice, an open pair of classes, and any class.
TABLE = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)


def rows(count: int, width: int, optional: bool) -> dict:
    generator = torch.Generator().manual_seed(count)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, max(high, 1), (count,), generator=generator)

    arguments = {
        "embeddings": normalize(torch.randn(count, width, generator=generator), dim=1),
        "identity": integers(-1, count // 3),
        "candidate_set": integers(0, len(TABLE)),
        "set_table": TABLE,
        "temperature": torch.tensor(0.1),
    }
    if optional:
        arguments |= {
            "group": integers(-1, count // 6),
            "row_weight": torch.rand(count, generator=generator),
            "present": torch.rand(count, generator=generator) > 0.2,
            "label_weight": 0.4,
        }
    return arguments


def evaluate(arguments: dict, implementation: str, dtype: torch.dtype) -> list[torch.Tensor]:
    device = DEVICE if implementation == "triton" else "cpu"
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    leaves = [moved["embeddings"].to(dtype), moved["temperature"].to(torch.promote_types(dtype, torch.float32))]
    moved |= dict(zip(("embeddings", "temperature"), (leaf.requires_grad_() for leaf in leaves), strict=True))
    out = mixed_contrastive_loss(**moved, implementation=implementation)
    gradients = torch.autograd.grad(3 * out.loss, leaves)
    return [value.detach().cpu().double() for value in (*out, *gradients)]


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize(("count", "width"), [(1, 8), (2, 33), (16, 64), (25, 40), (32, 16)])
def test_equals_the_definition(count, width, optional, monkeypatch):
    monkeypatch.setattr(fused, "make_index", None)  # which the other path begins with
    arguments = rows(count, width, optional)
    got, want = evaluate(arguments, "triton", torch.float32), evaluate(arguments, "reference", torch.float64)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_bfloat16_rows_are_multiplied_as_they_are():
    arguments = rows(30, 48, True)
    arguments["embeddings"] = arguments["embeddings"].bfloat16().float()
    got, want = evaluate(arguments, "triton", torch.bfloat16), evaluate(arguments, "reference", torch.float64)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0)
    assert (got[-2] - want[-2]).norm() < 3e-3 * want[-2].norm()


def test_one_row_more_takes_the_planned_path(monkeypatch):
    monkeypatch.setattr(small, "loss", None)
    arguments = rows(small.LARGEST + 1, 16, False)
    got, want = evaluate(arguments, "triton", torch.float32), evaluate(arguments, "reference", torch.float64)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, equal_nan=True)
