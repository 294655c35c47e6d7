"""The backbone is MONAI's DynUNet, part for part; the heads give rows of length one."""

from __future__ import annotations

import functools

import pytest
import torch
from monai.networks.nets import DynUNet
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from mixcl_dist import precision
from mixcl_dist.cluster.engine import EngineConfig, launch
from mixcl_dist.config import NetworkConfig
from mixcl_dist.networks import heads
from mixcl_dist.networks.dynunet import Backbone
from mixcl_dist.networks.heads import PretrainNetwork, SegmentationNetwork

FILTERS = (4, 6, 8)
ARCHITECTURES = ["dynunet", "residual_dynunet"]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """On every machine alike; tests of bfloat16 switch it on."""
    answer = torch.compiler.assume_constant_result(lambda device: False)
    monkeypatch.setattr(precision, "has_bfloat16", answer)


def config(architecture: str = "dynunet") -> NetworkConfig:
    return NetworkConfig(architecture=architecture, filters=FILTERS, voxel_dim=12, crop_dim=10)


def voxels(count: int = 9) -> torch.Tensor:
    return torch.stack([torch.arange(count) % 2, *torch.randint(8, (3, count))], dim=1)


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


@pytest.mark.parametrize("bfloat16", [False, True])
def test_embeddings_have_length_one_in_float32(monkeypatch, bfloat16):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: bfloat16)
    output = PretrainNetwork(config())(torch.randn(2, 1, 8, 8, 8), voxels())
    assert output.voxel.shape == (9, 12) and output.crop.shape == (2, 10)
    assert output.reconstruction.shape == (2, 1, 8, 8, 8)
    assert output.reconstruction.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    for embedding in (output.voxel, output.crop):
        assert embedding.dtype == torch.float32
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(len(embedding)))


def test_rows_are_rounded_for_the_loss_once_they_have_length_one(monkeypatch):
    network, image, index = PretrainNetwork(config()), torch.randn(2, 1, 8, 8, 8), voxels()
    exact = network(image, index)
    monkeypatch.setattr(heads, "row_dtype", lambda device: torch.bfloat16)
    rounded = network(image, index)
    torch.testing.assert_close(rounded.voxel, exact.voxel.bfloat16(), rtol=0, atol=0)
    assert rounded.crop.dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "bfloat16", "dtype"),
    [("cuda", True, torch.bfloat16), ("cuda", False, torch.float32), ("cpu", True, torch.float32)],
)
def test_rows_are_bfloat16_on_a_gpu_that_has_it(monkeypatch, device, bfloat16, dtype):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: bfloat16)
    assert precision.row_dtype(torch.device(device)) == dtype
    assert ("bfloat16" in precision.arithmetic(torch.device(device))) == bfloat16


def test_the_network_autocasts_within_an_engine_that_switches_it_off(monkeypatch):
    """DeepSpeed looks at CUDA's autocast state alone, so that is set here to see on a CPU what a GPU would do."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    network = PretrainNetwork(config())
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3)
    schedule = functools.partial(LambdaLR, lr_lambda=lambda step: 1)
    engine = launch(network, optimizer, schedule, micro_batch_size=1, config=EngineConfig())
    torch.set_autocast_enabled("cuda", True)
    try:
        output = engine(torch.randn(2, 1, 8, 8, 8), voxels())
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert output.reconstruction.dtype == torch.bfloat16 and network.reconstruction_head.weight.dtype == torch.float32
    engine.close()


def test_a_row_is_the_head_at_its_own_voxel_of_every_level():
    """Independent truth: torch's own trilinear interpolation of whole maps."""
    network, image = PretrainNetwork(config()), torch.randn(2, 1, 8, 8, 8)
    index = torch.tensor([[1, 2, 7, 5], [0, 0, 0, 0], [1, 7, 7, 7], [0, 3, 4, 1]])
    view, x, y, z = index.unbind(1)
    coarse, middle, fine = network.backbone(image)
    maps = [fine, *[F.interpolate(level, (8, 8, 8), mode="trilinear") for level in (coarse, middle)]]
    expected = network.voxel_head(torch.cat([level[view, :, x, y, z] for level in maps], dim=1))
    rows = network(image, index).voxel
    torch.testing.assert_close(rows, F.normalize(expected, dim=1), atol=1e-5, rtol=1e-4)


def test_no_rows_are_allowed():
    output = PretrainNetwork(config())(torch.randn(2, 1, 8, 8, 8), torch.zeros(0, 4, dtype=torch.int64))
    assert output.voxel.shape == (0, 12)


def test_the_memory_format_changes_no_result():
    network, image, index = PretrainNetwork(config()), torch.randn(2, 1, 8, 8, 8), voxels()
    plain = network(image, index)
    network = network.to(memory_format=torch.channels_last_3d)
    for a, b in zip(plain, network(image.to(memory_format=torch.channels_last_3d), index), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_network_is_one_graph_for_the_compiler():
    """Also where the hardware is asked for bfloat16; what the graph is compiled to is the compiler's business."""
    network, image, index = PretrainNetwork(config()), torch.randn(2, 1, 8, 8, 8), voxels()
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=False)
    for a, b in zip(network(image, index), compiled(image, index), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_an_image_that_cannot_be_halved_often_enough_is_refused():
    with pytest.raises(ValueError, match=r"image of \(8, 8, 10\) voxels: every edge must be a multiple of 4"):
        Backbone(config())(torch.randn(1, 1, 8, 8, 10))


def test_a_segmentation_network_starts_from_a_pretrained_backbone():
    pretrained = PretrainNetwork(config()).backbone
    network = SegmentationNetwork(config(), n_classes=3)
    network.backbone.load_state_dict(pretrained.state_dict())
    image = torch.randn(1, 1, 8, 8, 8)
    expected = network.classifier(pretrained(image)[-1])
    logits = network(image)
    assert logits.shape == (1, 4, 8, 8, 8)
    torch.testing.assert_close(logits, expected)
