"""MixCL's three consistencies, identity, label and reconstruction, joined to one loss."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn import functional as F

from mixcl_dist.constants import constant
from mixcl_dist.kernels import mixed_contrastive_loss
from mixcl_dist.networks.heads import NetworkOutput
from mixcl_dist.pretraining.rows import Rows
from mixcl_dist.pretraining.views import Views
from mixcl_dist.settings import ObjectiveConfig

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def mixcl_loss(
    output: NetworkOutput,
    views: Views,
    rows: Rows,
    config: ObjectiveConfig,
    process_group: ProcessGroup | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of all terms, differentiable, and the terms unweighted and detached, all 0-d.

    The batch is that of all processes of `process_group`: their rows contrast with each other, every process has the
    value of the whole batch, and the mean over processes of their gradients is that of the whole batch's loss.
    Identity and label terms also give their floor (the least value that can be reached) and the mean cosine of
    their positives (NaN without anchors). Terms of weight 0 are neither computed nor returned.
    """
    total = constant(0.0, output.voxel.dtype, output.voxel.device)
    terms: dict[str, torch.Tensor] = {}
    if config.voxel_identity or config.voxel_label:
        loss, voxel_terms = _voxel_consistency(output.voxel, rows, config, process_group)
        total, terms = total + loss, terms | voxel_terms
    if config.crop_identity:
        loss, crop_terms = _crop_identity(output.crop, config, process_group)
        total, terms = total.add(loss, alpha=config.crop_identity), terms | crop_terms
    if config.reconstruction:
        loss = _reconstruction(output.reconstruction, views, config, process_group)
        total, terms = total.add(loss, alpha=config.reconstruction), terms | {"reconstruction": loss}
    return total, {name: value.detach() for name, value in terms.items()}


def _voxel_consistency(
    embeddings: torch.Tensor, rows: Rows, config: ObjectiveConfig, process_group: ProcessGroup | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = mixed_contrastive_loss(
        embeddings,
        rows.identity,
        rows.candidate_set,
        rows.set_table,
        present=rows.present,
        temperature=config.voxel_temperature,
        identity_weight=config.voxel_identity,
        label_weight=config.voxel_label,
        process_group=process_group,
    )
    terms = {}
    if config.voxel_identity:
        terms["voxel_identity"] = out.identity_loss
        terms["voxel_identity_floor"] = out.identity_floor
        terms["voxel_identity_similarity"] = out.identity_similarity
    if config.voxel_label:
        terms["voxel_label"] = out.label_loss
        terms["voxel_label_floor"] = out.label_floor
        terms["voxel_label_similarity"] = out.label_similarity
        terms["voxel_label_anchors"] = out.label_anchors
    return out.loss, terms


def _crop_identity(
    embeddings: torch.Tensor, config: ObjectiveConfig, process_group: ProcessGroup | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Both views of a patch against all other views; a crop may show any class, so none is known to be the same."""
    rank = 0 if process_group is None else process_group.rank()
    patch, candidate_set = _crop_keys(len(embeddings), rank, embeddings.device)
    any_class = constant(((True, True),), torch.bool, embeddings.device)
    out = mixed_contrastive_loss(
        embeddings,
        patch,
        candidate_set,
        any_class,
        temperature=config.crop_temperature,
        label_weight=0.0,
        process_group=process_group,
    )
    return out.loss, {"crop_identity": out.identity_loss, "crop_identity_floor": out.identity_floor}


@functools.lru_cache(maxsize=8)
def _crop_keys(views: int, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch, in the numbers of this process, and candidate set of each view, (V,) int64."""
    patch = (torch.arange(views // 2, device=device) + rank * (views // 2)).repeat(2)
    return patch, torch.zeros_like(patch)


def _reconstruction(
    restored: torch.Tensor, views: Views, config: ObjectiveConfig, process_group: ProcessGroup | None
) -> torch.Tensor:
    """Smooth-L1 against the clean view, averaged with weight `masked_weight` on masked voxels and 1 elsewhere."""
    error = F.smooth_l1_loss(restored.float(), views.clean, reduction="none", beta=config.reconstruction_beta)
    masked, other = constant((config.masked_weight, 1.0), error.dtype, error.device)
    weight = torch.where(views.mask, masked, other)
    total, count = (weight * error).sum(), weight.sum()
    if process_group is None:
        return total / count
    of_all = torch.stack([total.detach(), count])
    dist.all_reduce(of_all, group=process_group)
    own = total * (process_group.size() / of_all[1])
    return own + (of_all[0] / of_all[1] - own).detach()  # the value of all, the gradient of one's own
