"""The mixed contrastive loss; see README.md for its mathematics and costs."""

from mixcl_dist.kernels.loss import MixedContrastiveLoss, mixed_contrastive_loss
from mixcl_dist.kernels.output import MixedContrastiveOutput

__all__ = ["MixedContrastiveLoss", "MixedContrastiveOutput", "mixed_contrastive_loss"]
