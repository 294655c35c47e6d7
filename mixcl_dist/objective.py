"""MixCL's three consistencies, identity, label and reconstruction, joined to one loss."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

from mixcl_dist.config import ObjectiveConfig
from mixcl_dist.constants import constant
from mixcl_dist.kernels import MixedContrastiveOutput, mixed_contrastive_loss
from mixcl_dist.networks import NetworkOutput
from mixcl_dist.rows import Rows
from mixcl_dist.views import Views


def mixcl_loss(
    output: NetworkOutput, views: Views, rows: Rows, config: ObjectiveConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of all terms, differentiable, and the terms unweighted and detached, all 0-d.

    Identity and label terms also give their floor (the least value that can be reached) and the mean cosine of
    their positives (NaN without anchors). Terms of weight 0 are neither computed nor returned.
    """
    total = constant(0.0, output.voxel.dtype, output.voxel.device)
    terms: dict[str, torch.Tensor] = {}
    if config.voxel_identity or config.voxel_label:
        loss, voxel_terms = _voxel_consistency(output, rows, config)
        total, terms = total + loss, terms | voxel_terms
    if config.crop_identity:
        loss, crop_terms = _crop_identity(output.crop, config)
        total, terms = total.add(loss, alpha=config.crop_identity), terms | crop_terms
    if config.reconstruction:
        loss = _reconstruction(output.reconstruction, views, config)
        total, terms = total.add(loss, alpha=config.reconstruction), terms | {"reconstruction": loss}
    return total, {name: value.detach() for name, value in terms.items()}


def _voxel_consistency(
    output: NetworkOutput, rows: Rows, config: ObjectiveConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    def contrast(embeddings: torch.Tensor, identity_weight: float, label_weight: float) -> MixedContrastiveOutput:
        return mixed_contrastive_loss(
            embeddings,
            rows.identity,
            rows.candidate_set,
            rows.set_table,
            group=rows.group,
            present=rows.present,
            temperature=config.voxel_temperature,
            identity_weight=identity_weight,
            label_weight=label_weight,
        )

    if config.identity_negatives == "patch" and config.voxel_identity:
        identity = contrast(_with_patch(output.voxel, rows, len(output.crop) // 2), config.voxel_identity, 0.0)
        label = contrast(output.voxel, 0.0, config.voxel_label)
        total, shift = identity.loss + label.loss, 1.0
    else:
        identity = label = contrast(output.voxel, config.voxel_identity, config.voxel_label)
        total, shift = identity.loss, 0.0
    terms = {}
    if config.voxel_identity:
        terms["voxel_identity"] = identity.identity_loss
        terms["voxel_identity_floor"] = identity.identity_floor
        terms["voxel_identity_similarity"] = identity.identity_similarity - shift
    if config.voxel_label:
        terms["voxel_label"] = label.label_loss
        terms["voxel_label_floor"] = label.label_floor
        terms["voxel_label_similarity"] = label.label_similarity
        terms["voxel_label_anchors"] = label.label_anchors
    return total, terms


def _with_patch(embeddings: torch.Tensor, rows: Rows, patches: int) -> torch.Tensor:
    """(R, D + patches): with their patch as further coordinates, rows of one patch are all more alike by 1.

    Within a patch that cancels in the loss; rows of other patches weigh e^(-1/temperature) of what they did, as good as
    nothing. So the kernel, which knows no patches, contrasts each with itself.
    """
    patch = rows.voxel_index[:, :1] % patches
    return torch.cat([embeddings, patch == torch.arange(patches, device=patch.device)], dim=1)


def _crop_identity(embeddings: torch.Tensor, config: ObjectiveConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Both views of a patch against all other views; a crop may show any class, so none is known to be the same."""
    patch, candidate_set = _crop_keys(len(embeddings), embeddings.device)
    any_class = constant(((True, True),), torch.bool, embeddings.device)
    out = mixed_contrastive_loss(
        embeddings,
        patch,
        candidate_set,
        any_class,
        temperature=config.crop_temperature,
        label_weight=0.0,
    )
    return out.loss, {"crop_identity": out.identity_loss, "crop_identity_floor": out.identity_floor}


@functools.lru_cache(maxsize=8)
def _crop_keys(views: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch and candidate set of each view, (V,) int64."""
    patch = torch.arange(views // 2, device=device).repeat(2)
    return patch, torch.zeros_like(patch)


def _reconstruction(restored: torch.Tensor, views: Views, config: ObjectiveConfig) -> torch.Tensor:
    """Smooth-L1 against the clean view, averaged with weight `masked_weight` on masked voxels and 1 elsewhere."""
    error = F.smooth_l1_loss(restored.float(), views.clean, reduction="none", beta=config.reconstruction_beta)
    masked, other = constant((config.masked_weight, 1.0), error.dtype, error.device)
    weight = torch.where(views.mask, masked, other)
    return (weight * error).sum() / weight.sum()
