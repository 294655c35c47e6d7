"""nnU-Net's U-Net with a residual encoder as a backbone, from `dynamic-network-architectures`.

Its blocks a level are those of nnU-Net's plans: 1, 3, 4, 6, 6, …; with channels 32, 64, 128, 256, 320, 320 it is
ResEncL of 102 M parameters.
"""

from __future__ import annotations

import pydoc
from typing import Any

import torch
from torch import nn

from mixcl_dist.config import ConfigError
from mixcl_dist.networks import backbone
from mixcl_dist.networks.spacing import divisor, levels
from mixcl_dist.settings import NetworkConfig

CLASS = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
IMPORTED = ("conv_op", "norm_op", "nonlin")
"""Arguments that are classes; as JSON their names."""
REQUIRES: tuple[str, ...] = ("dynamic-network-architectures",)
OUTPUTS, HEAD = "num_classes", "decoder.seg_layers."
DEPTH_SETTING, ONE_SIZE = "filters", False
CLASSIFIER = {
    "classifier.weight": "decoder.seg_layers.{last}.weight",
    "classifier.bias": "decoder.seg_layers.{last}.bias",
}


def arguments(config: NetworkConfig) -> dict[str, Any]:
    """Arguments of ResidualEncoderUNet but `num_classes`, as plain JSON values."""
    count = len(config.filters)
    kernels, strides = levels(config)
    return {
        "input_channels": 1,
        "n_stages": count,
        "features_per_stage": list(config.filters),
        "conv_op": "torch.nn.Conv3d",
        "kernel_sizes": kernels,
        "strides": strides,
        "n_blocks_per_stage": [1, 3, 4, *[6] * count][:count],
        "n_conv_per_stage_decoder": [1] * (count - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        # In place it would change a view of the norm's result, for which autograd copies gradients many times.
        "nonlin_kwargs": {"inplace": False},
    }


def build(config: NetworkConfig, out_channels: int) -> nn.Module:
    """Raises `ConfigError` where the package is missing."""
    try:
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
    except ImportError:
        cure = "pip install 'mixcl-dist[nnunet]', or choose another"
        raise ConfigError(f"network.architecture resenc_unet: needs dynamic-network-architectures; {cure}") from None
    given = arguments(config)
    classes = {name: pydoc.locate(given[name]) for name in IMPORTED}
    return ResidualEncoderUNet(**given | classes, num_classes=out_channels)


class Backbone(backbone.Backbone):
    """Encoder and decoder without the output layers; parameters carry the first of the names that the public network
    has for each of them."""

    encoder: Any
    decoder: Any

    def __init__(self, config: NetworkConfig):
        super().__init__()
        network: Any = build(config, 1)
        self.encoder = network.encoder
        self.decoder = nn.Module()
        self.decoder.stages, self.decoder.transpconvs = network.decoder.stages, network.decoder.transpconvs
        for module in self.modules():
            if hasattr(module, "all_modules"):  # it registers its layers a second time, and computes by these
                for name in ("conv", "norm", "dropout", "nonlin"):
                    if name in module._modules:
                        del module._modules[name]
        self.level_divisor = divisor(config)

    def levels(self) -> list[list[nn.Parameter]]:
        ups = [nn.ModuleList(pair) for pair in zip(self.decoder.transpconvs, self.decoder.stages, strict=True)]
        blocks = [*reversed(ups), *reversed(self.encoder.stages), self.encoder.stem]
        return [list(block.parameters()) for block in blocks]

    def pyramid(self, image: torch.Tensor) -> list[torch.Tensor]:
        first, *others = self.encoder.stages
        skips = [self._run(first, self._run(self.encoder.stem, image))]
        for stage in others:
            skips.append(self._run(stage, skips[-1]))
        pyramid = [skips.pop()]
        for up, stage in zip(self.decoder.transpconvs, self.decoder.stages, strict=True):
            pyramid.append(self._run(stage, torch.cat([up(pyramid[-1]), skips.pop()], dim=1)))
        return pyramid
