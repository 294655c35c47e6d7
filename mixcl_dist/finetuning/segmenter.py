"""The network that is fine-tuned: a backbone and a classifier of voxels, which others help while it learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixcl_dist.linear import of_levels
from mixcl_dist.networks.architectures import build_backbone
from mixcl_dist.networks.backbone import Backbone
from mixcl_dist.settings import NetworkConfig


class SegmentationNetwork(nn.Module):
    """Backbone with a linear classifier of voxels."""

    def __init__(self, config: NetworkConfig, n_classes: int):
        super().__init__()
        self.backbone = build_backbone(config)
        self.classifier = nn.Conv3d(config.filters[0], n_classes + 1, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, x, y, z) normalised → logits (B, n_classes + 1, x, y, z), background first."""
        return self.classifier(self.backbone(image)[-1])


class LearningNetwork(nn.Module):
    """A segmentation network and linear classifiers of the coarser levels of its pyramid, whose logits are added.

    With few labels the finest level, a handful of channels, takes hundreds of steps to tell organs apart, while the
    whole pyramid tells them from the first: it is what pre-training taught (vox2vec, Goncharov et al. 2023, fine-tunes
    such a head). As `coarse_share` falls from 1 to 0, the finest level learns to do without the others, and what is
    kept is the public network alone.
    """

    def __init__(self, segmenter: SegmentationNetwork, config: NetworkConfig):
        super().__init__()
        self.segmenter = segmenter
        outputs = segmenter.classifier.out_channels
        coarse = [nn.Conv3d(width, outputs, kernel_size=1, bias=False) for width in reversed(config.filters[1:])]
        self.coarse = nn.ModuleList(coarse)
        self.coarse_share = 1.0

    @property
    def backbone(self) -> Backbone:
        return self.segmenter.backbone

    @property
    def classifier(self) -> nn.Conv3d:
        return self.segmenter.classifier

    def forward(self, image: Tensor) -> Tensor:
        """As `SegmentationNetwork`."""
        *coarse, finest = self.backbone(image)
        logits = self.classifier(finest)
        if not self.coarse_share:
            return logits
        for classifier, features in zip(self.coarse, coarse, strict=True):
            found = F.interpolate(classifier(features), finest.shape[2:], mode="trilinear")
            logits = logits + self.coarse_share * found
        return logits

    @torch.no_grad()
    def set_classifiers(self, weight: Tensor, bias: Tensor, pyramid: list[Tensor]) -> None:
        """Let the classifiers, added up, be a linear one (`linear.fit`) of a pyramid such as that of this backbone."""
        for classifier, of_level in zip([*self.coarse, self.classifier], of_levels(weight, pyramid), strict=True):
            classifier.weight.copy_(of_level[..., None, None, None])
        self.classifier.get_parameter("bias").copy_(bias)
