"""The heads give rows of length one."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from mixcl_dist import precision
from mixcl_dist.cluster.engine import EngineConfig, launch
from mixcl_dist.networks import heads
from mixcl_dist.networks.heads import PretrainNetwork

from .small_networks import config, voxels


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


def test_levels_may_differ_in_their_numbers():
    """On a GPU autocast leaves SegResNet's last level in float32, as it ends in a group normalisation."""
    pyramid = [torch.randn(2, channels, edge, edge, edge) for channels, edge in ((6, 2), (4, 4), (3, 8))]
    mixed = [level.bfloat16() for level in pyramid[:-1]] + pyramid[-1:]
    index = voxels()
    found = heads.voxels_of(mixed, index)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, heads.voxels_of(pyramid, index), rtol=0.02, atol=0.05)


def test_no_rows_are_allowed():
    output = PretrainNetwork(config())(torch.randn(2, 1, 8, 8, 8), torch.zeros(0, 4, dtype=torch.int64))
    assert output.voxel.shape == (0, 12)


def test_the_network_is_one_graph_for_the_compiler():
    """Also where the hardware is asked for bfloat16; what the graph is compiled to is the compiler's business."""
    network, image, index = PretrainNetwork(config()), torch.randn(2, 1, 8, 8, 8), voxels()
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=False)
    for a, b in zip(network(image, index), compiled(image, index), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()
