"""Views, rows and network output joined to one loss."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from mixcl_dist.networks.heads import NetworkOutput, PretrainNetwork
from mixcl_dist.pretraining.draws import Draws
from mixcl_dist.pretraining.objective import mixcl_loss
from mixcl_dist.pretraining.rows import Rows, sample_rows
from mixcl_dist.pretraining.views import Views, make_views
from mixcl_dist.settings import NetworkConfig, ObjectiveConfig, RowsConfig, ViewsConfig

OFF = {"voxel_identity": 0.0, "voxel_label": 0.0, "crop_identity": 0.0, "reconstruction": 0.0}
UNLABELLED = [0b1111] * 4
LABELLED = [0b1100, 0b0001, 0b0010, 0b1111]


def step(bits: list[int], objective: ObjectiveConfig, network: PretrainNetwork | None = None):
    """One pass of two patients through views, rows, network and loss."""
    draws = Draws(0, range(2))
    generator = torch.manual_seed(0)
    config = ViewsConfig(size=(16, 16, 16), mask_block=4)
    image = torch.randint(-1000, 1000, (2, 1, 24, 24, 24), generator=generator).to(torch.int16)
    label = torch.zeros(2, 24, 24, 24, dtype=torch.uint8)
    if bits != UNLABELLED:
        label[:, 4:20, 4:12], label[:, 4:20, 12:20] = 1, 2
    views = make_views(image, torch.tensor([[1.0, 1.0, 2.5]] * 2), config, (-1000, 1000), draws)
    candidate_bits = torch.tensor([bits, bits])[..., None]
    rows = sample_rows(views.patch_from_view, (16,) * 3, label, candidate_bits, RowsConfig(), draws)
    network = network or PretrainNetwork(NetworkConfig(filters=(4, 6, 8)))
    return mixcl_loss(network(views.image, rows.voxel_index), views, rows, objective)


def output_of(voxel=None, crop=None, reconstruction=None) -> NetworkOutput:
    empty = torch.zeros(0, 4)
    return NetworkOutput(
        empty if voxel is None else voxel,
        empty if crop is None else crop,
        empty if reconstruction is None else reconstruction,
    )


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def rows_with(identity: list[int], candidate_set: list[int], set_table: list[list[bool]]) -> Rows:
    index = torch.zeros(len(identity), 4, dtype=torch.int64)
    present = torch.ones(len(identity), dtype=torch.bool)
    return Rows(index, torch.tensor(identity), torch.tensor(candidate_set), torch.tensor(set_table), present)


def info_nce(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of each row's twin, half the rows away, among all other rows."""
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def test_a_step_from_patches_to_gradients_reaches_every_parameter():
    network = PretrainNetwork(NetworkConfig(filters=(4, 6, 8)))
    total, terms = step(LABELLED, ObjectiveConfig(), network)
    total.backward()
    assert all(value.isfinite() and value.dim() == 0 and not value.requires_grad for value in terms.values())
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_total_is_the_weighted_sum_of_the_terms():
    weights = {"voxel_identity": 0.5, "voxel_label": 2.0, "crop_identity": 0.25, "reconstruction": 3.0}
    total, terms = step(LABELLED, ObjectiveConfig(**weights))
    assert terms["voxel_label_anchors"] > 0
    torch.testing.assert_close(total.detach(), sum(weight * terms[name] for name, weight in weights.items()))


@pytest.mark.parametrize("only", list(OFF))
def test_a_weight_of_zero_switches_a_term_off(only):
    total, terms = step(LABELLED, ObjectiveConfig(**{**OFF, only: 1.0}))
    assert {name for name in terms if name in OFF} == {only}
    torch.testing.assert_close(total.detach(), terms[only])


def test_a_batch_without_labels_has_no_label_term():
    total, terms = step(UNLABELLED, ObjectiveConfig())
    assert terms["voxel_label"] == 0 and terms["voxel_label_anchors"] == 0
    assert total.isfinite() and terms["voxel_identity"] > 0


def test_without_labels_voxel_identity_is_info_nce():
    z = unit(12, 8)
    rows = rows_with([*range(6)] * 2, [0] * 12, [[True] * 4])
    _, terms = mixcl_loss(output_of(z), None, rows, ObjectiveConfig(**{**OFF, "voxel_identity": 1.0}))
    torch.testing.assert_close(terms["voxel_identity"], info_nce(z, 0.1))


def test_crop_identity_is_info_nce_over_the_views():
    z = unit(10, 8)
    _, terms = mixcl_loss(output_of(crop=z), None, None, ObjectiveConfig(**{**OFF, "crop_identity": 1.0}))
    torch.testing.assert_close(terms["crop_identity"], info_nce(z, 0.2))


def test_a_class_attracts_across_patients_and_repels_other_classes():
    """Rows 0, 1 are liver of two patients, 2 and 3 spleen; no two show the same point."""
    z = unit(4, 8).requires_grad_()
    rows = rows_with([0, 1, 2, 3], [0, 0, 1, 1], [[True, False, False, False], [False, True, False, False]])
    total, _ = mixcl_loss(output_of(z), None, rows, ObjectiveConfig(**{**OFF, "voxel_label": 1.0}))
    total.backward()
    before = (z @ z.T).detach()
    moved = F.normalize(z.detach() - 0.01 * z.grad, dim=1)
    change = moved @ moved.T - before
    assert change[0, 1] > 0 and change[2, 3] > 0
    assert change[:2, 2:].sum() < 0


def test_reconstruction_weighs_masked_voxels_more():
    """Independent truth: the definition in float64."""
    generator = torch.Generator().manual_seed(0)
    clean, restored = torch.randn(2, 2, 1, 4, 4, 4, generator=generator)
    mask = torch.rand(2, 1, 4, 4, 4, generator=generator) < 0.3
    views = Views(image=clean, clean=clean, mask=mask, patch_from_view=torch.eye(4).repeat(2, 1, 1))
    objective = ObjectiveConfig(**{**OFF, "reconstruction": 1.0}, masked_weight=5.0, reconstruction_beta=0.5)
    total, _ = mixcl_loss(output_of(reconstruction=restored), views, None, objective)
    gap = (restored - clean).double().abs()
    error = torch.where(gap < 0.5, gap**2 / (2 * 0.5), gap - 0.5 / 2)
    expected = (5 * error[mask].sum() + error[~mask].sum()) / (5 * mask.sum() + (~mask).sum())
    torch.testing.assert_close(total.double(), expected)


def test_a_perfect_reconstruction_costs_nothing():
    clean = torch.randn(2, 1, 4, 4, 4)
    views = Views(clean, clean, torch.ones_like(clean, dtype=torch.bool), torch.eye(4).repeat(2, 1, 1))
    objective = ObjectiveConfig(**{**OFF, "reconstruction": 1.0})
    assert mixcl_loss(output_of(reconstruction=clean), views, None, objective)[0] == 0


def test_rows_that_are_not_present_change_nothing():
    z, objective = unit(12, 8), ObjectiveConfig(**{**OFF, "voxel_identity": 1.0, "voxel_label": 1.0})
    table = [[True, False, False, False], [False, True, False, False], [True] * 4]
    rows = rows_with([*range(6)] * 2, [0, 1, 2, 0, 1, 2] * 2, table)
    present = torch.tensor([True, True, True, True, False, False] * 2)
    some = dataclasses.replace(rows, present=present)
    kept = rows_with(rows.identity[present].tolist(), rows.candidate_set[present].tolist(), table)
    expected, _ = mixcl_loss(output_of(z[present]), None, kept, objective)
    torch.testing.assert_close(mixcl_loss(output_of(z), None, some, objective)[0], expected)


def test_no_row_present_gives_a_finite_loss():
    rows = rows_with([0, 1, 0, 1], [0] * 4, [[True] * 4])
    rows = dataclasses.replace(rows, present=torch.zeros(4, dtype=torch.bool))
    z = unit(4, 8).requires_grad_()
    objective = ObjectiveConfig(**{**OFF, "voxel_identity": 1.0, "voxel_label": 1.0})
    total, _ = mixcl_loss(output_of(z), None, rows, objective)
    total.backward()
    assert total == 0 and (z.grad == 0).all()


def test_an_objective_without_any_term_is_refused():
    with pytest.raises(ValueError, match="every weight is 0"):
        ObjectiveConfig(**OFF)
