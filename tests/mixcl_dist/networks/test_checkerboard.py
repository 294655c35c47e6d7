"""Where the pattern of every second voxel in a restored slice comes from: the decoder's transposed convolutions.

Each of them gives the voxels of a pair weights of their own. Put linear interpolation and a 1 x 1 x 1 convolution in
their place, all else being equal, and most of the pattern is gone.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from mixcl_dist.networks.dynunet import Backbone
from mixcl_dist.phantom import draw_torso
from mixcl_dist.settings import NetworkConfig

CROP, STEPS = 16, 40


class Interpolated(nn.Module):
    """What a transposed convolution of stride 2 does, without weights of its own for every second voxel."""

    def __init__(self, transposed: nn.ConvTranspose3d) -> None:
        super().__init__()
        self.mix = nn.Conv3d(transposed.in_channels, transposed.out_channels, kernel_size=1, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.mix(F.interpolate(features, scale_factor=2, mode="trilinear"))


def restorers(seed: int) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    config = NetworkConfig(filters=(4, 6, 8))
    backbone, head = Backbone(config), nn.Conv3d(config.filters[0], 1, kernel_size=1)
    other = copy.deepcopy(backbone)
    for block in other.upsamples:
        block.transp_conv = Interpolated(block.transp_conv.conv)
    return {
        "transposed": nn.ModuleList([backbone, head]),
        "interpolated": nn.ModuleList([other, copy.deepcopy(head)]),
    }


def restored(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    backbone, head = network
    return head(backbone(image)[-1])


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """(5, 1, X, Y, Z) normalised torsos."""
    torsos = [draw_torso((48, 40, 48), 6.0, np.random.default_rng(seed))[0] for seed in range(5)]
    return torch.from_numpy(np.stack(torsos))[:, None].float().add(900).div(800).sub(1).clamp(-1, 1)


def ripple(image: torch.Tensor) -> float:
    """Root mean square of what changes sign from voxel to voxel, away from the border."""
    inner = image[..., 3:-3, 3:-3, 3:-3]
    total = 0.0
    for axis in (2, 3, 4):
        before, here, after = (inner.narrow(axis, start, inner.shape[axis] - 2) for start in range(3))
        total += float(((before - 2 * here + after) / 4).square().mean())
    return total**0.5


def train(network: nn.Module, images: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(STEPS):
        places = [torch.randint(edge - CROP + 1, (1,), generator=generator) for edge in images.shape[2:]]
        x, y, z = (slice(int(place), int(place) + CROP) for place in places)
        clean = images[:4, :, x, y, z]
        noisy = clean + 0.1 * torch.randn(clean.shape, generator=generator)
        optimizer.zero_grad()
        F.smooth_l1_loss(restored(network, noisy), clean, beta=0.1).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("trained", "seed"), [(False, 0), *(pytest.param(True, seed, marks=pytest.mark.slow) for seed in range(3))]
)
def test_without_transposed_convolutions_most_of_the_pattern_is_gone(images, trained, seed):
    """On a smooth image, which has none of it. Of the networks' three seeds the ratios are printed."""
    smooth = torch.from_numpy(ndimage.gaussian_filter(images[4:].numpy(), (0, 0, 2, 2, 2)))
    found = {}
    for name, network in restorers(seed).items():
        if trained:
            train(network, images, seed)
        with torch.no_grad():
            found[name] = ripple(restored(network, smooth[..., :32, :32, :32]))
    print({name: round(value, 4) for name, value in found.items()}, "image", round(ripple(smooth), 4))
    assert found["transposed"] > 1.5 * found["interpolated"]
    assert trained or found["transposed"] > 3 * found["interpolated"]
