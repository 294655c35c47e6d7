"""The mixed contrastive loss; see README.md for its mathematics and costs."""

from mixcl_dist.kernels.loss import MixedContrastiveLoss, mixed_contrastive_loss
from mixcl_dist.kernels.output import MixedContrastiveOutput
from mixcl_dist.kernels.statistics import alignment_and_uniformity

__all__ = ["MixedContrastiveLoss", "MixedContrastiveOutput", "alignment_and_uniformity", "mixed_contrastive_loss"]
