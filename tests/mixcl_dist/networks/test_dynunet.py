"""The backbone is MONAI's DynUNet, part for part."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.networks.nets import DynUNet
from torch import nn

from mixcl_dist.config import ConfigError
from mixcl_dist.networks.architectures import check_size
from mixcl_dist.networks.dynunet import Backbone
from mixcl_dist.networks.heads import PretrainNetwork
from mixcl_dist.settings import NetworkConfig

from .small_networks import FILTERS, config, voxels

ARCHITECTURES = ["dynunet", "residual_dynunet"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dynunet_with_the_backbones_weights_computes_the_same_features(architecture):
    backbone = Backbone(config(architecture))
    network = DynUNet(
        3, 1, 1, [3, 3, 3], [1, 2, 2], [2, 2], filters=FILTERS, res_block=architecture == "residual_dynunet"
    )
    left = network.load_state_dict(backbone.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert {key.split(".")[0] for key in left.missing_keys} == {"output_block", "skip_layers"}
    network.output_block = nn.Identity()
    image = torch.randn(2, 1, 8, 16, 8)
    pyramid = backbone(image)
    torch.testing.assert_close(pyramid[-1], network(image))
    assert [tuple(level.shape) for level in pyramid] == [(2, 8, 2, 4, 2), (2, 6, 4, 8, 4), (2, 4, 8, 16, 8)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_used_once(architecture):
    network = PretrainNetwork(config(architecture))
    output = network(torch.randn(2, 1, 8, 8, 8), voxels())
    sum((value * torch.randn_like(value)).sum() for value in output).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    stored = [tensor.data_ptr() for tensor in network.state_dict().values()]
    assert len(stored) == len(set(stored))


def test_the_memory_format_changes_no_result():
    network, image, index = PretrainNetwork(config()), torch.randn(2, 1, 8, 8, 8), voxels()
    plain = network(image, index)
    network = network.to(memory_format=torch.channels_last_3d)
    for a, b in zip(plain, network(image.to(memory_format=torch.channels_last_3d), index), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_an_image_that_cannot_be_halved_often_enough_is_refused():
    with pytest.raises(ValueError, match=r"image of \(8, 8, 10\) voxels: every edge must be a multiple of 4"):
        Backbone(config())(torch.randn(1, 1, 8, 8, 10))


@given(st.lists(st.integers(1, 200), min_size=3, max_size=3), st.integers(3, 6))
def test_the_size_that_a_refusal_advises_is_taken(size, levels):
    network = NetworkConfig(filters=(4,) * levels)
    try:
        check_size("views.size", network, size)
    except ConfigError as refused:
        advised = re.search(r"try ([\d,]+),? ", str(refused)).group(1)
        check_size("views.size", network, [int(edge) for edge in advised.strip(",").split(",")])
