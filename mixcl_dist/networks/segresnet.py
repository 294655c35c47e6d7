"""MONAI's SegResNet as a backbone."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets import SegResNet
from torch import nn

from mixcl_dist.networks import backbone
from mixcl_dist.networks.spacing import divisor
from mixcl_dist.settings import NetworkConfig

CLASS = "monai.networks.nets.SegResNet"
IMPORTED: tuple[str, ...] = ()
REQUIRES: tuple[str, ...] = ()
OUTPUTS, HEAD = "out_channels", "conv_final.2."
DEPTH_SETTING, ONE_SIZE = "filters", False
CLASSIFIER = {
    "classifier.weight": "conv_final.2.conv.weight",
    "classifier.bias": "conv_final.2.conv.bias",
}


def arguments(config: NetworkConfig) -> dict[str, Any]:
    """Arguments of SegResNet but `out_channels`, as plain JSON values: 1, 2, …, 2, 4 blocks a level on the way down."""
    levels = len(config.filters)
    return {
        "spatial_dims": 3,
        "init_filters": config.filters[0],
        "in_channels": 1,
        "blocks_down": [1] + [2] * (levels - 2) + [4],
        "blocks_up": [1] * (levels - 1),
        # In place it would change a view of the norm's result, for which autograd copies gradients many times.
        "act": ["RELU", {"inplace": False}],
        "norm": ["GROUP", {"num_groups": 8}],
    }


def build(config: NetworkConfig, out_channels: int) -> nn.Module:
    return SegResNet(**arguments(config), out_channels=out_channels)


class Backbone(backbone.Backbone):
    """A SegResNet up to its last convolution; its parameters carry SegResNet's own names."""

    convInit: nn.Module
    down_layers: nn.ModuleList
    up_samples: nn.ModuleList
    up_layers: nn.ModuleList
    conv_final: nn.Module

    def __init__(self, config: NetworkConfig):
        super().__init__()
        network: Any = build(config, 1)
        self.convInit = network.convInit
        self.down_layers = network.down_layers
        self.up_samples = network.up_samples
        self.up_layers = network.up_layers
        self.conv_final = network.conv_final[:2]
        self.level_divisor = divisor(config)

    def levels(self) -> list[list[nn.Parameter]]:
        ups = [nn.ModuleList(pair) for pair in zip(self.up_samples, self.up_layers, strict=True)]
        blocks = [self.conv_final, *reversed(ups), *reversed(self.down_layers), self.convInit]
        return [list(block.parameters()) for block in blocks]

    def pyramid(self, image: torch.Tensor) -> list[torch.Tensor]:
        skips = [self._run(self.down_layers[0], self.convInit(image))]
        for down in self.down_layers[1:]:
            skips.append(self._run(down, skips[-1]))
        pyramid = [skips.pop()]
        for sample, layer in zip(self.up_samples, self.up_layers, strict=True):
            pyramid.append(self._run(layer, sample(pyramid[-1]) + skips.pop()))
        return [*pyramid[:-1], self.conv_final(pyramid[-1])]
