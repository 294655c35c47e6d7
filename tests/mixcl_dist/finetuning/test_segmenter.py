"""A segmentation network starts from a pre-trained backbone."""

from __future__ import annotations

import torch

from mixcl_dist.finetuning.segmenter import SegmentationNetwork
from mixcl_dist.networks.heads import PretrainNetwork

from ..networks.small_networks import config


def test_a_segmentation_network_starts_from_a_pretrained_backbone():
    pretrained = PretrainNetwork(config()).backbone
    network = SegmentationNetwork(config(), n_classes=3)
    network.backbone.load_state_dict(pretrained.state_dict())
    image = torch.randn(1, 1, 8, 8, 8)
    expected = network.classifier(pretrained(image)[-1])
    logits = network(image)
    assert logits.shape == (1, 4, 8, 8, 8)
    torch.testing.assert_close(logits, expected)
