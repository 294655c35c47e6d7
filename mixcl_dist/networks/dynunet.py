"""MONAI's DynUNet as a backbone."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets import DynUNet
from torch import nn

from mixcl_dist.networks import backbone
from mixcl_dist.networks.spacing import divisor, levels
from mixcl_dist.settings import NetworkConfig

CLASS = "monai.networks.nets.DynUNet"
IMPORTED: tuple[str, ...] = ()
REQUIRES: tuple[str, ...] = ()
OUTPUTS, HEAD = "out_channels", "output_block."
DEPTH_SETTING, ONE_SIZE = "filters", False
CLASSIFIER = {
    "classifier.weight": "output_block.conv.conv.weight",
    "classifier.bias": "output_block.conv.conv.bias",
}


def arguments(config: NetworkConfig) -> dict[str, Any]:
    """Arguments of DynUNet but `out_channels`, as plain JSON values."""
    kernels, strides = (each if config.kernel_spacing_mm else [x for x, *_ in each] for each in levels(config))
    return {
        "spatial_dims": 3,
        "in_channels": 1,
        "kernel_size": kernels,
        "strides": strides,
        "upsample_kernel_size": strides[1:],
        "filters": list(config.filters),
        "norm_name": ["INSTANCE", {"affine": True}],
        "res_block": config.architecture == "residual_dynunet",
    }


def build(config: NetworkConfig, out_channels: int) -> nn.Module:
    return DynUNet(**arguments(config), out_channels=out_channels)


class Backbone(backbone.Backbone):
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
        self.level_divisor = divisor(config)

    def levels(self) -> list[list[nn.Parameter]]:
        blocks = [*reversed(self.upsamples), self.bottleneck, *reversed(self.downsamples), self.input_block]
        return [list(block.parameters()) for block in blocks]

    def pyramid(self, image: torch.Tensor) -> list[torch.Tensor]:
        skips = [self._run(self.input_block, image)]
        for downsample in self.downsamples:
            skips.append(self._run(downsample, skips[-1]))
        pyramid = [self._run(self.bottleneck, skips[-1])]
        for upsample, skip in zip(self.upsamples, reversed(skips), strict=True):
            pyramid.append(self._run(upsample, pyramid[-1], skip))
        return pyramid
