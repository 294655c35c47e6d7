"""A segmentation network starts from a pre-trained backbone; while it learns, coarser levels help."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mixcl_dist.finetuning.segmenter import LearningNetwork, SegmentationNetwork
from mixcl_dist.linear import of_levels
from mixcl_dist.networks.heads import PretrainNetwork
from mixcl_dist.settings import NetworkConfig

from ..networks.small_networks import SMALL, config


def test_a_segmentation_network_starts_from_a_pretrained_backbone():
    pretrained = PretrainNetwork(config()).backbone
    network = SegmentationNetwork(config(), n_classes=3)
    network.backbone.load_state_dict(pretrained.state_dict())
    image = torch.randn(1, 1, 8, 8, 8)
    expected = network.classifier(pretrained(image)[-1])
    logits = network(image)
    assert logits.shape == (1, 4, 8, 8, 8)
    torch.testing.assert_close(logits, expected)


def learning() -> LearningNetwork:
    torch.manual_seed(0)
    return LearningNetwork(SegmentationNetwork(config(), n_classes=3), config())


def test_all_levels_together_are_one_linear_classifier_of_the_pyramid():
    network, image = learning(), torch.randn(1, 1, 16, 16, 16)
    pyramid = network.backbone(image)
    weight, bias = torch.randn(4, sum(level.shape[1] for level in pyramid)), torch.randn(4)
    network.set_classifiers(weight, bias, pyramid)
    columns = [torch.einsum("nfxyz,cf->ncxyz", *pair) for pair in zip(pyramid, of_levels(weight, pyramid), strict=True)]
    expected = sum(F.interpolate(column, (16, 16, 16), mode="trilinear") for column in columns)
    torch.testing.assert_close(network(image), expected + bias[:, None, None, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", [name for name in SMALL if name != "resenc_unet"])
def test_every_network_s_levels_help(architecture):
    """nnU-Net's networks are of an extra; their pyramid is as wide (`test_architectures`)."""
    of_network = NetworkConfig(architecture=architecture, filters=SMALL[architecture])
    network = LearningNetwork(SegmentationNetwork(of_network, n_classes=2), of_network)
    edges = [2 * step for step in network.backbone.level_divisor]
    assert network(torch.randn(1, 1, *edges)).shape == (1, 3, *edges)


def test_the_share_of_the_coarser_levels_scales_what_they_add():
    network, image = learning(), torch.randn(1, 1, 8, 8, 8)
    found = {}
    for share in (0.0, 0.5, 1.0):
        network.coarse_share = share
        found[share] = network(image)
    torch.testing.assert_close(found[0.0], network.segmenter(image))
    torch.testing.assert_close(found[0.5], (found[0.0] + found[1.0]) / 2)
