"""The network that is pre-trained: a backbone and the heads on it.

Legend: V views, F features of a voxel, G channels of the bottleneck, R rows, D width of an embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from mixcl_dist.constants import constant, lattice
from mixcl_dist.networks.architectures import build_backbone
from mixcl_dist.precision import autocast, row_dtype
from mixcl_dist.settings import NetworkConfig


class NetworkOutput(NamedTuple):
    """What the objective is computed from; a tuple, as ZeRO-3 looks for tensors in those."""

    voxel: torch.Tensor
    """(R, D) embeddings of length 1, rounded to the device's `row_dtype` after they were normalised in float32."""
    crop: torch.Tensor
    """(V, D') float32 embeddings of length 1."""
    reconstruction: torch.Tensor
    """(V, 1, x, y, z) in the range of normalised images."""


class PretrainNetwork(nn.Module):
    """Backbone with a voxel head, a crop head and a reconstruction head, which pre-training throws away."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.backbone = build_backbone(config)
        self.voxel_head = _mlp(sum(config.filters), config.voxel_dim)
        self.crop_head = _mlp(2 * config.filters[-1], config.crop_dim)
        self.reconstruction_head = nn.Conv3d(config.filters[0], 1, kernel_size=1)

    def forward(self, image: torch.Tensor, voxel_index: torch.Tensor) -> NetworkOutput:
        """`image` (V, 1, x, y, z) normalised; `voxel_index` (R, 4) int64: the view and voxel of each row.

        Autocasts by itself, as the engine switches off one around it.
        """
        with autocast(image.device):
            pyramid = self.backbone(image)
            bottleneck, features = pyramid[0], pyramid[-1]
            # Instance normalisation fixes a channel's average up to the activation, so the maximum is pooled, too.
            pooled = torch.cat([bottleneck.mean(dim=(2, 3, 4)), bottleneck.amax(dim=(2, 3, 4))], dim=1)
            return NetworkOutput(
                voxel=_directions(self.voxel_head(voxels_of(pyramid, voxel_index))).to(row_dtype(image.device)),
                crop=_directions(self.crop_head(pooled)),
                reconstruction=self.reconstruction_head(features),
            )


def voxels_of(pyramid: list[torch.Tensor], voxel_index: torch.Tensor) -> torch.Tensor:
    """(R, all channels) features of voxels (R, 4) int64 (view, x, y, z): first those of the last level of a backbone's
    pyramid at the voxel, then those of the others from the coarsest on, interpolated linearly at its centre (vox2vec,
    Goncharov et al. 2023, joins levels so)."""
    *coarse, finest = pyramid
    view, x, y, z = voxel_index.unbind(1)
    columns = [finest[view, :, x, y, z]]
    if coarse:
        corners, weights = _corners(voxel_index[:, 1:], tuple(tuple(level.shape[2:]) for level in pyramid))
        # The finest level may have other numbers: a GPU's autocast normalises groups in float32, as SegResNet's ends.
        view, weights = view[:, None], weights.to(coarse[0].dtype)
        for features, (x, y, z), weight in zip(coarse, corners, weights, strict=True):
            columns.append((weight @ features[view, :, x, y, z])[:, 0])
    return torch.cat(columns, dim=1)


def _corners(voxel: torch.Tensor, sizes: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The eight voxels (L, 3, R, 8) int64 around voxels (R, 3) on L grids over the same space; and their weights
    (L, R, 1, 8) float32. `sizes` (L + 1, 3) are those of the grids, and of the voxels' own. Beyond a border its voxels
    are repeated."""
    *grids, own = sizes
    factors = tuple(tuple(edge / fine for edge, fine in zip(grid, own, strict=True)) for grid in grids)
    factor = constant(factors, torch.float32, voxel.device)
    side = lattice((2, 2, 2), voxel.device).T[:, None]
    position = ((voxel.T + 0.5) * factor[..., None] - 0.5)[..., None]
    lower = position.floor()
    share = position - lower
    weight = torch.where(side == 1, share, 1 - share).prod(1)
    last = constant(tuple(tuple(edge - 1 for edge in grid) for grid in grids), torch.int64, voxel.device)
    return (lower.long() + side).clamp_min_(0).minimum(last[..., None, None]), weight[:, :, None]


def _directions(embedding: torch.Tensor) -> torch.Tensor:
    """Rows brought to length 1 in float32."""
    return F.normalize(embedding.float(), dim=1)


def _mlp(channels: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, dim), nn.GELU(), nn.Linear(dim, dim))
