"""Hounsfield units → the network's input range."""

from __future__ import annotations

import torch

from mixcl_dist.constants import constant


def normalise(hu: torch.Tensor, window_hu: tuple[float, float]) -> torch.Tensor:
    """Map HU of any dtype linearly to float32: `window_hu` to [-1, 1], values outside clipped."""
    return rescale(hu, window_hu).clamp(-1, 1)


def rescale(hu: torch.Tensor, window_hu: tuple[float, float]) -> torch.Tensor:
    """As `normalise`, but values outside are kept."""
    low, high = window_hu
    scale = 2 / (high - low)
    return torch.add(constant(-1 - low * scale, torch.float32, hu.device), hu, alpha=scale)  # one launch
