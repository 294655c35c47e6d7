"""Pre-train 3D segmentation networks on large, mostly unlabelled CT archives with mixed contrastive learning."""

__version__ = "0.1.0"
