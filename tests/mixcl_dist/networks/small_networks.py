"""Small networks and voxels for them."""

from __future__ import annotations

import torch

from mixcl_dist.settings import NetworkConfig

FILTERS = (4, 6, 8)
SMALL = {
    "dynunet": (4, 6, 8),
    "residual_dynunet": (4, 6, 8),
    "resenc_unet": (4, 6, 8),
    "segresnet": (8, 16, 32),
    "swin_unetr": (12, 12, 24, 48, 96, 192),
}
"""Architecture → channels."""


def config(architecture: str = "dynunet") -> NetworkConfig:
    return NetworkConfig(architecture=architecture, filters=FILTERS, voxel_dim=12, crop_dim=10)


def voxels(count: int = 9) -> torch.Tensor:
    return torch.stack([torch.arange(count) % 2, *torch.randint(8, (3, count))], dim=1)
