from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from mixcl_dist.kernels import alignment_and_uniformity, mixed_contrastive_loss


def sphere(n: int, d: int = 64) -> torch.Tensor:
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0)), dim=1)


def test_rows_that_coincide_are_aligned_and_not_uniform():
    alignment, uniformity = alignment_and_uniformity(sphere(1).repeat(10, 1), torch.arange(10) // 2)
    assert alignment == uniformity == 0


def test_rows_all_over_the_sphere_are_uniform():
    """In many dimensions |x − y|² is near 2, so uniformity near −4."""
    z = sphere(2000)
    alignment, uniformity = alignment_and_uniformity(z.repeat(2, 1), torch.arange(2000).repeat(2))
    assert alignment == pytest.approx(0, abs=1e-6) and uniformity.item() == pytest.approx(-4, abs=0.2)


def test_alignment_is_what_the_similarity_of_twins_says():
    """|x − y|² = 2 − 2 x·y of unit rows."""
    z, identity = sphere(300), torch.arange(300) // 2
    out = mixed_contrastive_loss(z, identity, torch.zeros(300).long(), torch.ones(1, 2) > 0)
    assert alignment_and_uniformity(z, identity)[0].item() == pytest.approx(
        2 - 2 * out.identity_similarity.item(), rel=1e-5
    )


def test_a_sample_holds_twins_together():
    z = sphere(5000)
    identity = torch.randperm(5000, generator=torch.Generator().manual_seed(0)).repeat(2)
    alignment, _ = alignment_and_uniformity(z.repeat(2, 1), identity, rows=100)
    assert alignment == pytest.approx(0, abs=1e-6)


def test_without_twins_there_is_no_alignment():
    alignment, uniformity = alignment_and_uniformity(sphere(50), torch.full((50,), -1))
    assert math.isnan(alignment) and uniformity.isfinite()
    assert all(value.isnan() for value in alignment_and_uniformity(sphere(1), torch.zeros(1).long()))
