"""The network that is fine-tuned: a backbone and a classifier of voxels."""

from __future__ import annotations

import torch
from torch import nn

from mixcl_dist.networks.architectures import build_backbone
from mixcl_dist.settings import NetworkConfig


class SegmentationNetwork(nn.Module):
    """Backbone with a linear classifier of voxels."""

    def __init__(self, config: NetworkConfig, n_classes: int):
        super().__init__()
        self.backbone = build_backbone(config)
        self.classifier = nn.Conv3d(config.filters[0], n_classes + 1, kernel_size=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 1, x, y, z) normalised → logits (B, n_classes + 1, x, y, z), background first."""
        return self.classifier(self.backbone(image)[-1])
