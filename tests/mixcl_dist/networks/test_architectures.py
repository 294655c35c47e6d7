"""Every backbone is the public network that it is named after, and goes the whole way from shards to predictions."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from mixcl_dist.config import Config, ConfigError, from_dict, replace
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.export import export
from mixcl_dist.finetuning.finetune import finetune
from mixcl_dist.finetuning.predict import predict
from mixcl_dist.finetuning.segmenter import SegmentationNetwork
from mixcl_dist.networks import architectures
from mixcl_dist.phantom import write_cohort
from mixcl_dist.pretraining.pretrain import pretrain
from mixcl_dist.settings import NetworkConfig

from .small_networks import SMALL


@pytest.fixture(params=[*list(SMALL)[:-1], "anisotropic", pytest.param("swin_unetr", marks=pytest.mark.slow)])
def network(request):
    if request.param == "resenc_unet":
        pytest.importorskip(
            "dynamic_network_architectures",
            reason="dynamic-network-architectures is not installed; pip install -e '.[nnunet]'",
        )
    if request.param == "anisotropic":
        return NetworkConfig(filters=SMALL["dynunet"], kernel_spacing_mm=(1.0, 1.0, 5.0))
    return NetworkConfig(request.param, SMALL[request.param])


def test_it_computes_what_the_public_network_does_with_the_same_weights(network):
    torch.manual_seed(0)
    ours, public = SegmentationNetwork(network, 2).eval(), architectures.architecture(network).build(network, 3).eval()
    with torch.no_grad():
        for parameter in public.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours.load_state_dict(architectures.named_here(network, public.state_dict()))
    image = torch.randn(1, 1, *np.multiply(architectures.divisor(network), (1, 1, 2)))
    with torch.no_grad():
        torch.testing.assert_close(ours(image), public(image))


def test_its_pyramid_has_the_channels_of_the_configuration_each_level_twice_as_fine(network):
    backbone = architectures.build_backbone(network)
    size = 2 * np.array(architectures.divisor(network))
    pyramid = backbone(torch.randn(1, 1, *size))
    assert [level.shape[1] for level in pyramid] == list(reversed(network.filters))
    halved = np.array([1, 1, 0] if network.kernel_spacing_mm else [1, 1, 1])
    assert [level.shape[2:] for level in pyramid] == [tuple(size >> n * halved) for n in range(len(pyramid))][::-1]
    with pytest.raises(ValueError, match=r"must be (a multiple|multiples) of"):
        backbone(torch.randn(1, 1, size[0] + 1, *size[1:]))


def test_every_parameter_is_of_one_level_and_learns(network):
    segmenter = SegmentationNetwork(network, 2)
    levels = [id(weight) for level in segmenter.backbone.levels() for weight in level]
    assert sorted(levels) == sorted(id(weight) for weight in segmenter.backbone.parameters())
    size = np.multiply(architectures.divisor(network), (1, 1, 2))
    segmenter(torch.randn(2, 1, *size)).square().mean().backward()
    assert [name for name, weight in segmenter.named_parameters() if weight.grad is None] == []


def test_its_shapes_are_known_without_memory(network):
    shapes = {name: weight.shape for name, weight in architectures.build_backbone(network).state_dict().items()}
    assert architectures.expected(network) == shapes


@pytest.mark.parametrize(
    ("architecture", "filters", "says"),
    [
        ("segresnet", [16, 32, 48], "16,32,48: segresnet doubles a multiple of 8, as in 16,32,64,128"),
        ("segresnet", [12, 24, 48], "segresnet doubles a multiple of 8"),
        ("swin_unetr", [24, 48, 96], "swin_unetr has f,f,2f,4f,8f,16f"),
    ],
)
def test_channels_that_a_network_cannot_have_are_refused_with_those_that_it_can(architecture, filters, says):
    with pytest.raises(ConfigError, match=says):
        from_dict({"network": {"architecture": architecture, "filters": filters}})


def test_nnunets_plan_l_has_the_parameters_that_are_published():
    reason = "dynamic-network-architectures is not installed; pip install -e '.[nnunet]'"
    pytest.importorskip("dynamic_network_architectures", reason=reason)
    plan = NetworkConfig("resenc_unet", (32, 64, 128, 256, 320, 320))
    count = sum(shape.numel() for shape in architectures.expected(plan).values())
    assert round(count / 1e6) == 102


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    return write_cohort(folder, training=2, validation=1, unlabelled=1, size=(72, 40, 40), spacing_mm=7.0)


@pytest.mark.slow
def test_it_pretrains_fine_tunes_exports_and_predicts(network, sources, tmp_path):
    settings = {"network.architecture": network.architecture, "network.filters": list(network.filters)}
    settings |= {"network.kernel_spacing_mm": network.kernel_spacing_mm}
    settings |= {"network.voxel_dim": 8, "network.crop_dim": 8, "build.patch_size": [64, 32, 32]}
    settings |= {"views.size": [64, 32, 32], "rows.per_view_pair": 16, "pretrain.batch_size": 2, "pretrain.steps": 1}
    settings |= {"finetune.patch_size": [64, 32, 32], "finetune.steps": 2, "budget.fraction": 1.0}
    config = replace(Config(), settings)
    build(sources, tmp_path / "shards", config.build)
    pretrain(replace(config, {"budget.fraction": 0.0}), shards=tmp_path / "shards", run=tmp_path / "pretrained")
    finetune(config, data=sources[0], start=tmp_path / "pretrained", run=tmp_path / "few")
    assert json.loads((tmp_path / "few" / "network.json").read_text())["architecture"] == network.architecture
    predict(tmp_path / "few", sources[0], tmp_path / "predicted")
    for to in ("bundle", "monai", "hf"):
        predict(export(tmp_path / "few", to, tmp_path / to), sources[0], tmp_path / f"predicted_{to}")
        for file in (tmp_path / "predicted" / "labels").iterdir():
            there = nib.load(tmp_path / f"predicted_{to}" / "labels" / file.name)
            np.testing.assert_array_equal(np.asarray(there.dataobj), np.asarray(nib.load(file).dataobj))
