"""The figures beside the loss: gradients of single terms, and how voxel rows are spread, against independent truths."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from mixcl_dist.networks.heads import PretrainNetwork
from mixcl_dist.pretraining.diagnostics import SAMPLED_ROWS, effective_rank, gradient_norms, spread
from mixcl_dist.pretraining.draws import Draws
from mixcl_dist.pretraining.objective import mixcl_loss
from mixcl_dist.pretraining.rows import sample_rows
from mixcl_dist.pretraining.views import make_views
from mixcl_dist.settings import NetworkConfig, ObjectiveConfig, RowsConfig, ViewsConfig

TERMS = ("voxel_identity", "voxel_label", "crop_identity", "reconstruction")
WEIGHTED = ObjectiveConfig(voxel_identity=0.5, voxel_label=2.0, crop_identity=0.25, reconstruction=3.0)


@pytest.fixture(scope="module")
def batch():
    """A network, and views and rows of two patients with two organs."""
    draws = Draws(0, range(2))
    generator = torch.manual_seed(0)
    image = torch.randint(-1000, 1000, (2, 1, 24, 24, 24), generator=generator).to(torch.int16)
    label = torch.zeros(2, 24, 24, 24, dtype=torch.uint8)
    label[:, 4:20, 4:12], label[:, 4:20, 12:20] = 1, 2
    views = make_views(image, torch.ones(2, 3), ViewsConfig(size=(16, 16, 16), mask_block=4), (-1000, 1000), draws)
    candidate_bits = torch.tensor([[0b1100, 0b0001, 0b0010, 0b1111]] * 2)[..., None]
    rows = sample_rows(views.patch_from_view, (16,) * 3, label, candidate_bits, RowsConfig(per_view_pair=32), draws)
    return PretrainNetwork(NetworkConfig(filters=(4, 6, 8))), views, rows


def backbone_gradient(batch, objective) -> torch.Tensor:
    """All of it as one vector, by a plain backward pass of a copy."""
    network, views, rows = copy.deepcopy(batch[0]), *batch[1:]
    mixcl_loss(network(views.image, rows.voxel_index), views, rows, objective)[0].backward()
    gradients = [parameter.grad for parameter in network.backbone.parameters() if parameter.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_each_terms_norm_is_that_of_a_backward_pass_of_it_alone(batch):
    norms = gradient_norms(*batch, WEIGHTED)
    assert list(norms) == [f"gradient_norm_{term}" for term in TERMS]
    for term in TERMS:
        off = dict.fromkeys(TERMS, 0.0)
        alone = backbone_gradient(batch, ObjectiveConfig(**off | {term: 1.0})).norm()
        torch.testing.assert_close(
            norms[f"gradient_norm_{term}"], getattr(WEIGHTED, term) * alone, rtol=1e-3, atol=1e-6
        )
    whole = backbone_gradient(batch, WEIGHTED).norm()
    assert max(norms.values()) * 2 - sum(norms.values()) <= whole * 1.001 and whole <= sum(norms.values()) * 1.001


def test_a_term_without_weight_is_not_measured_and_no_gradient_is_left(batch):
    norms = gradient_norms(*batch, ObjectiveConfig(voxel_label=0.0, reconstruction=0.0))
    assert set(norms) == {"gradient_norm_voxel_identity", "gradient_norm_crop_identity"}
    assert all(parameter.grad is None for parameter in batch[0].parameters())


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=1)


def test_spread_is_as_its_authors_compute_it():
    """`align_loss` and `uniform_loss` of Wang and Isola, written out."""
    first, second = unit(40, 8).split(20)
    present = torch.ones(40, dtype=torch.bool)
    figures = spread(torch.cat([first, second]), present)
    uniformity = [torch.pdist(x.double()).pow(2).mul(-2).exp().mean().log() for x in (first, second)]
    torch.testing.assert_close(figures["alignment"], (first - second).norm(dim=1).pow(2).mean())
    torch.testing.assert_close(figures["uniformity"].double(), sum(uniformity) / 2, rtol=1e-5, atol=1e-5)


def test_rows_that_are_not_present_do_not_count():
    z = unit(40, 8)
    present = (torch.arange(20) % 3 > 0).repeat(2)
    for name, figure in spread(z, present).items():
        torch.testing.assert_close(figure, spread(z[present], torch.ones_like(present)[present])[name], msg=name)
    nothing = spread(z, torch.zeros_like(present))
    assert nothing["alignment"].isnan() and nothing["uniformity"].isnan()
    assert math.isnan(effective_rank(nothing["second_moment"]))


def test_of_many_rows_some_are_sampled_with_their_twins():
    """Twins are alike, and a patch in ten shows another direction: so it is among the sampled ones."""
    pairs = 5 * SAMPLED_ROWS
    z = torch.zeros(pairs, 3)
    z[:, 0] = 1
    z[: pairs // 10] = torch.tensor([0.0, 0.0, 1.0])
    figures = spread(z.repeat(2, 1), torch.ones(2 * pairs, dtype=torch.bool))
    assert figures["alignment"] == 0
    assert figures["second_moment"].trace() == pytest.approx(SAMPLED_ROWS, rel=1e-3)
    assert figures["second_moment"][2, 2] == pytest.approx(SAMPLED_ROWS / 10, rel=0.01)


@pytest.mark.parametrize("directions", [1, 3, 8])
def test_the_effective_rank_counts_directions_that_are_used_alike(directions):
    z = torch.eye(8)[torch.arange(48) % directions]
    moment = spread(z, torch.ones(48, dtype=torch.bool))["second_moment"]
    assert effective_rank(moment) == pytest.approx(directions, rel=1e-4)


def test_the_effective_rank_is_that_of_the_singular_values():
    z = unit(60, 8) * torch.tensor([1, 1, 0.5, 0.3, 0.2, 0.1, 0.1, 0.01])
    values = torch.linalg.svdvals(z.double())
    expected = torch.distributions.Categorical(probs=values).entropy().exp()
    assert effective_rank(z.double().T @ z.double()) == pytest.approx(expected.item())


def test_rows_that_are_all_alike_are_not_spread_at_all():
    figures = spread(torch.ones(20, 8), torch.ones(20, dtype=torch.bool))
    assert figures["uniformity"] == pytest.approx(0, abs=1e-5)
    assert effective_rank(figures["second_moment"]) == pytest.approx(1, rel=1e-4)
