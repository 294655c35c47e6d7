"""MONAI's DynUNet as a backbone.

Legend: V views or images, F features of a voxel, G channels of the bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets import DynUNet
from torch import nn
from torch.utils.checkpoint import checkpoint

from mixcl_dist.config import ConfigError, NetworkConfig

CLASS = "monai.networks.nets.DynUNet"


def arguments(config: NetworkConfig) -> dict[str, Any]:
    """Arguments of DynUNet but `out_channels`, as plain JSON values."""
    levels = len(config.filters)
    return {
        "spatial_dims": 3,
        "in_channels": 1,
        "kernel_size": [3] * levels,
        "strides": [1] + [2] * (levels - 1),
        "upsample_kernel_size": [2] * (levels - 1),
        "filters": list(config.filters),
        "norm_name": ["INSTANCE", {"affine": True}],
        "res_block": config.architecture == "residual_dynunet",
    }


def divisor(config: NetworkConfig) -> int:
    """What every edge of an image must be a multiple of."""
    return 2 ** (len(config.filters) - 1)


def misfit(config: NetworkConfig, size: Sequence[int]) -> str | None:
    """Why the network cannot be trained on images of `size` voxels, with the nearest size that fits; None if it can.

    Instance normalisation needs more than one voxel at the bottleneck.
    """
    step = divisor(config)
    near = [max(step, round(edge / step) * step) for edge in size]
    if math.prod(edge // step for edge in near) == 1:
        near[-1] *= 2
    if list(size) == near:
        return None
    least = " x ".join([str(step)] * 3)
    return f"every edge must be a multiple of {step}, and not all {least}; try {','.join(map(str, near))}"


def check_size(setting: str, config: NetworkConfig, size: Sequence[int]) -> None:
    """Raise `ConfigError` that names the setting where the network cannot be trained on images of `size` voxels."""
    if problem := misfit(config, size):
        raise ConfigError(f"{setting} {','.join(map(str, size))}: {problem}, or change network.filters")


def check_patches(config: NetworkConfig, patch_size: Sequence[int]) -> None:
    """Raise `ConfigError` where nothing that the network takes can be cut from patches of that size."""
    step = divisor(config)
    if misfit(config, [edge // step * step for edge in patch_size]):
        raise ConfigError(
            f"patches of {' x '.join(map(str, patch_size))} voxels are too small for network.filters "
            f"{','.join(map(str, config.filters))}; build shards with edges of {2 * step} or more, or give fewer"
        )


class Backbone(nn.Module):
    """Encoder and decoder of a DynUNet; its parameters carry DynUNet's own names, so they load into one as they are."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        network = DynUNet(
            **arguments(config),
            out_channels=1,
            # In place it would change a view of the norm's result, for which autograd copies gradients many times.
            act_name=("LEAKYRELU", {"negative_slope": 0.01, "inplace": False}),
        )
        # The parts alone: DynUNet registers them a second time, and an output layer that would never get a gradient.
        self.input_block = network.input_block
        self.downsamples = network.downsamples
        self.bottleneck = network.bottleneck
        self.upsamples = network.upsamples
        self.voxel_channels = config.filters[0]
        self.bottleneck_channels = config.filters[-1]
        self.level_divisor = divisor(config)
        self.recomputes = False
        """Whether the backward pass computes the activations of each block again, of which then none are kept."""

    def levels(self) -> list[list[nn.Parameter]]:
        """All parameters from the last layers to the first: the decoder's levels, the bottleneck, the encoder's."""
        blocks = [*reversed(self.upsamples), self.bottleneck, *reversed(self.downsamples), self.input_block]
        return [list(block.parameters()) for block in blocks]

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(V, 1, x, y, z) → the decoder's pyramid: the bottleneck (V, G, x/d, y/d, z/d), d = `level_divisor`, then
        each level at twice the resolution of the one before, up to (V, F, x, y, z).

        Raises `ValueError` where d does not divide an edge.
        """
        if any(edge % self.level_divisor for edge in image.shape[2:]):
            size = tuple(image.shape[2:])
            raise ValueError(f"image of {size} voxels: every edge must be a multiple of {self.level_divisor}")
        skips = [self._run(self.input_block, image)]
        for downsample in self.downsamples:
            skips.append(self._run(downsample, skips[-1]))
        pyramid = [self._run(self.bottleneck, skips[-1])]
        for upsample, skip in zip(self.upsamples, reversed(skips), strict=True):
            pyramid.append(self._run(upsample, pyramid[-1], skip))
        return pyramid

    def _run(self, block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)
