"""MONAI's SwinUNETR as a backbone."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets import SwinUNETR
from torch import nn
from torch.overrides import TorchFunctionMode

from mixcl_dist.networks import backbone
from mixcl_dist.settings import NetworkConfig

CLASS = "monai.networks.nets.SwinUNETR"
IMPORTED: tuple[str, ...] = ()
REQUIRES: tuple[str, ...] = ()
OUTPUTS, HEAD = "out_channels", "out."
DEPTH_SETTING, ONE_SIZE = "architecture", True  # a window is laid out by the size of the image
CLASSIFIER = {
    "classifier.weight": "out.conv.conv.weight",
    "classifier.bias": "out.conv.conv.bias",
}
ENCODERS = ("encoder1", "encoder2", "encoder3", "encoder4", "encoder10")
DECODERS = ("decoder5", "decoder4", "decoder3", "decoder2", "decoder1")


def arguments(config: NetworkConfig) -> dict[str, Any]:
    """Arguments of SwinUNETR but `out_channels`, as plain JSON values."""
    return {"in_channels": 1, "feature_size": config.filters[0], "spatial_dims": 3}


def build(config: NetworkConfig, out_channels: int) -> nn.Module:
    with _NumbersOnCpu():
        return SwinUNETR(**arguments(config), out_channels=out_channels)


class _NumbersOnCpu(TorchFunctionMode):
    """SwinUNETR asks a tensor for its drop rates, which one on the device "meta" cannot tell."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = dict(kwargs or {}) | ({"device": "cpu"} if func is torch.linspace else {})
        return func(*args, **given)


def divisor(config: NetworkConfig) -> tuple[int, int, int]:
    """What the edges of an image must be multiples of."""
    return 32, 32, 32


class Backbone(backbone.Backbone):
    """A SwinUNETR up to its output layer; its parameters carry SwinUNETR's own names."""

    swinViT: Any
    encoder1: nn.Module
    encoder2: nn.Module
    encoder3: nn.Module
    encoder4: nn.Module
    encoder10: nn.Module

    def __init__(self, config: NetworkConfig):
        super().__init__()
        network: Any = build(config, 1)
        self.swinViT = network.swinViT
        for name in (*ENCODERS, *DECODERS):
            setattr(self, name, getattr(network, name))
        self.level_divisor = divisor(config)

    def levels(self) -> list[list[nn.Parameter]]:
        skips = nn.ModuleList(getattr(self, name) for name in ENCODERS[:-1])
        stages = [getattr(self.swinViT, f"layers{n}") for n in (4, 3, 2, 1)]
        decoders = [getattr(self, name) for name in reversed(DECODERS)]
        blocks = [*decoders, self.encoder10, skips, *stages, self.swinViT.patch_embed]
        return [list(block.parameters()) for block in blocks]

    def pyramid(self, image: torch.Tensor) -> list[torch.Tensor]:
        hidden = self.swinViT(image)
        encoders = (self.encoder1, self.encoder2, self.encoder3, self.encoder4)
        skips = [self._run(*pair) for pair in zip(encoders, (image, *hidden[:3]), strict=True)]
        pyramid = [self.encoder10(hidden[4])]
        for name, skip in zip(DECODERS, [hidden[3], *reversed(skips)], strict=True):
            pyramid.append(self._run(getattr(self, name), pyramid[-1], skip))
        return pyramid
