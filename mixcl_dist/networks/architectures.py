"""The one face of all backbones: each is a file of its own, and says the same of itself.

A module here has `CLASS` (the public network's dotted name), `arguments(config)` (its arguments as JSON values, but the
number of outputs, which is called `OUTPUTS`), `IMPORTED` (those of them that name classes), `build(config, outputs)`
(the public network), `REQUIRES` (packages beside MONAI), `HEAD` (what the names of its output layers begin with),
`CLASSIFIER` (names of our output layer → there), `divisor(config)`, `DEPTH_SETTING` (what of `network` that depends
on), `ONE_SIZE` (whether a graph of it takes images of one size alone) and `Backbone(config)`, whose parameters carry
the public network's names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from mixcl_dist.config import ConfigError
from mixcl_dist.networks import dynunet, resenc_unet, segresnet, swin_unetr
from mixcl_dist.networks.backbone import Backbone
from mixcl_dist.networks.spacing import multiples
from mixcl_dist.settings import NetworkConfig

_OF = {
    "dynunet": dynunet,
    "residual_dynunet": dynunet,
    "resenc_unet": resenc_unet,
    "segresnet": segresnet,
    "swin_unetr": swin_unetr,
}


def architecture(config: NetworkConfig) -> ModuleType:
    return _OF[config.architecture]


def build_backbone(config: NetworkConfig) -> Backbone:
    return architecture(config).Backbone(config)


def weights_file(config: NetworkConfig) -> str:
    """What an export calls the public network's weights."""
    return architecture(config).__name__.rpartition(".")[2] + ".pt"


def classifier_names(config: NetworkConfig) -> dict[str, str]:
    """Our output layer's names → those in the public network."""
    last = len(config.filters) - 2
    return {ours: theirs.format(last=last) for ours, theirs in architecture(config).CLASSIFIER.items()}


def expected(config: NetworkConfig) -> dict[str, torch.Size]:
    """Names of a backbone's weights and their shapes, without making any."""
    with torch.device("meta"):  # no memory for what a forged description claims
        return {name: weight.shape for name, weight in build_backbone(config).state_dict().items()}


def named_here(config: NetworkConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The public network's weights under the names of a `SegmentationNetwork`; what it lists again is left out."""
    here = {theirs: ours for ours, theirs in classifier_names(config).items()}
    here |= {name: f"backbone.{name}" for name in expected(config)}
    return {here[name]: weight for name, weight in weights.items() if name in here}


def divisor(config: NetworkConfig) -> tuple[int, int, int]:
    """What the edges of an image must be multiples of."""
    return architecture(config).divisor(config)


def misfit(config: NetworkConfig, size: Sequence[int]) -> str | None:
    """Why the network cannot be trained on images of `size` voxels, with the nearest size that fits; None if it can.

    Instance normalisation needs more than one voxel at the bottleneck.
    """
    step = divisor(config)
    near = [max(least, round(edge / least) * least) for edge, least in zip(size, step, strict=True)]
    if near == list(step):
        near[-1] *= 2
    if list(size) == near:
        return None
    least = " x ".join(map(str, step))
    return f"{multiples(step)}, and not all {least}; try {','.join(map(str, near))}"


def check_size(setting: str, config: NetworkConfig, size: Sequence[int]) -> None:
    """Raise `ConfigError` that names the setting where the network cannot be trained on images of `size` voxels."""
    if problem := misfit(config, size):
        depth = architecture(config).DEPTH_SETTING
        raise ConfigError(f"{setting} {','.join(map(str, size))}: {problem}, or change network.{depth}")


def check_patches(config: NetworkConfig, patch_size: Sequence[int]) -> None:
    """Raise `ConfigError` where nothing that the network takes can be cut from patches of that size."""
    step = divisor(config)
    if misfit(config, [edge // least * least for edge, least in zip(patch_size, step, strict=True)]):
        least = " x ".join(str(2 * edge) for edge in step) if len(set(step)) > 1 else str(2 * step[0])
        depth = architecture(config).DEPTH_SETTING
        cure = "give fewer network.filters" if depth == "filters" else f"change network.{depth}"
        raise ConfigError(
            f"patches of {' x '.join(map(str, patch_size))} voxels are too small for {config.architecture} of filters "
            f"{','.join(map(str, config.filters))}; build shards with edges of {least} or more, or {cure}"
        )
