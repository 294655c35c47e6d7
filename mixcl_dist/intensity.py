"""Hounsfield units → the network's input range."""

from __future__ import annotations

import torch


def normalise(hu: torch.Tensor, window_hu: tuple[float, float]) -> torch.Tensor:
    """Map HU of any dtype linearly to float32: `window_hu` to [-1, 1], values outside clipped."""
    low, high = window_hu
    return ((hu.float() - low) * (2 / (high - low)) - 1).clamp(-1, 1)
