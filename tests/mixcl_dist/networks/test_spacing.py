"""Kernels and strides follow the voxels' spacing as nnU-Net and MONAI's DynUNet pipeline have it."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mixcl_dist.config import ConfigError, from_dict
from mixcl_dist.networks import dynunet
from mixcl_dist.networks.architectures import check_patches, check_size, divisor
from mixcl_dist.networks.heads import PretrainNetwork, voxels_of
from mixcl_dist.networks.spacing import levels
from mixcl_dist.settings import NetworkConfig

from .small_networks import FILTERS, SMALL


def of(*spacing, filters=FILTERS):
    return NetworkConfig(filters=filters, kernel_spacing_mm=spacing or None)


def dynunet_pipeline(spacings, count):
    """`get_kernels_strides` of MONAI's tutorial, for images that are large enough; there an axis of exactly twice the
    finest spacing counts as fine, in nnU-Net not."""
    strides, kernels = [], []
    for _ in range(count - 1):
        spacing_ratio = [sp / min(spacings) for sp in spacings]
        stride = [2 if ratio < 2 else 1 for ratio in spacing_ratio]
        kernels.append([3 if ratio < 2 else 1 for ratio in spacing_ratio])
        spacings = [i * j for i, j in zip(spacings, stride, strict=True)]
        strides.append(stride)
    return [*kernels, [3, 3, 3]], [[1, 1, 1], *strides]


@given(st.lists(st.floats(0.3, 12), min_size=3, max_size=3), st.integers(3, 8))
def test_they_are_those_of_monais_dynunet_pipeline(spacing, count):
    assert levels(of(*spacing, filters=(4,) * count)) == dynunet_pipeline(spacing, count)


def test_they_are_those_of_nnunets_plan_for_the_prostate():
    """Of 0.625 × 0.625 × 3.6 mm, as far as its patch of 256 × 320 × 20 voxels does not end the halving of an axis."""
    found = levels(of(0.625, 0.625, 3.6, filters=(32, 64, 128, 256, 320)))
    assert found.kernels[:4] == [[3, 3, 1], [3, 3, 1], [3, 3, 3], [3, 3, 3]]
    assert found.strides == [[1, 1, 1], [2, 2, 1], [2, 2, 1], [2, 2, 2], [2, 2, 2]]


def test_an_axis_of_twice_the_finest_spacing_waits_and_one_a_little_finer_does_not():
    assert levels(of(1, 1, 2)).strides[1] == [2, 2, 1]
    assert levels(of(1, 1, 1.99)).strides[1] == [2, 2, 2]


def test_without_a_spacing_a_network_is_what_it_was():
    """To the letter of its arguments, which exports hold."""
    assert dynunet.arguments(of()) == {
        "spatial_dims": 3,
        "in_channels": 1,
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [4, 6, 8],
        "norm_name": ["INSTANCE", {"affine": True}],
        "res_block": False,
    }
    assert divisor(of()) == (4, 4, 4)


def test_sizes_fit_each_axis_by_itself():
    network = of(1, 1, 5, filters=(4, 6, 8, 10))
    assert divisor(network) == (8, 8, 2)
    check_size("views.size", network, (16, 24, 6))
    with pytest.raises(ConfigError, match=r"edges must be multiples of 8 x 8 x 2, and not all 8 x 8 x 2; try 16,16,6"):
        check_size("views.size", network, (16, 18, 6))
    with pytest.raises(ConfigError, match="try 8,8,4"):
        check_size("views.size", network, (8, 8, 2))
    check_patches(network, (17, 9, 3))
    with pytest.raises(ConfigError, match="edges of 16 x 16 x 4 or more"):
        check_patches(network, (7, 9, 3))


def test_a_row_is_taken_from_every_level_at_its_own_place():
    """Independent truth: torch's own trilinear interpolation of whole maps, which are coarser in two axes alone."""
    torch.manual_seed(0)
    network, image = PretrainNetwork(of(1, 1, 3)), torch.randn(2, 1, 8, 12, 6)
    index = torch.tensor([[1, 2, 11, 5], [0, 0, 0, 0], [1, 7, 8, 3], [0, 3, 4, 1]])
    view, x, y, z = index.unbind(1)
    with torch.no_grad():
        pyramid = network.backbone(image)
        assert [tuple(level.shape[2:]) for level in pyramid] == [(2, 3, 3), (4, 6, 6), (8, 12, 6)]
        coarse, middle, fine = pyramid
        maps = [fine, *[F.interpolate(level, (8, 12, 6), mode="trilinear") for level in (coarse, middle)]]
        expected = torch.cat([level[view, :, x, y, z] for level in maps], dim=1)
        torch.testing.assert_close(voxels_of(pyramid, index), expected, atol=1e-5, rtol=1e-4)


def test_a_coarse_axis_is_not_looked_along_before_it_is_its_turn():
    """What the first level computes of a plane does not depend on its neighbours, but for the normalisation."""
    block = dynunet.Backbone(of(1, 1, 5)).input_block
    assert {tuple(weight.shape[2:]) for weight in block.parameters() if weight.ndim == 5} == {(3, 3, 1)}


@pytest.mark.parametrize("architecture", ["segresnet", "swin_unetr"])
def test_networks_of_fixed_kernels_refuse_a_spacing_and_the_others_that_are_named_take_it(architecture):
    tree = {"architecture": architecture, "filters": list(SMALL[architecture]), "kernel_spacing_mm": [1, 1, 5]}
    with pytest.raises(ConfigError, match=r"kernel_spacing_mm: .* leave it out, or choose (.*)$") as error:
        from_dict({"network": tree})
    for other in re.findall(r"\w*unet", str(error.value).partition("choose")[2]):
        from_dict({"network": tree | {"architecture": other}})
