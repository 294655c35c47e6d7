"""Checkpoints of others as a start, made from the published architectures with their names: no weights are at hand."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from monai.networks.nets import DynUNet, SegResNet, SwinUNETR

from mixcl_dist.config import Config, replace
from mixcl_dist.errors import RunError
from mixcl_dist.finetuning.finetune import finetune
from mixcl_dist.finetuning.foreign import open_foreign
from mixcl_dist.finetuning.start import like
from mixcl_dist.networks import architectures
from mixcl_dist.records import NetworkRecord, RunRecord
from mixcl_dist.settings import NetworkConfig

WINDOW = (-1000.0, 1000.0)
MONAI = {"orientation": "RAS", "axes": "xyz", "spacing_mm": [1.5, 1.5, 2.0], "window_hu": [-500.0, 500.0]}


def saved(folder, checkpoint, contract=None):
    file = folder / "theirs.pt"
    torch.save(checkpoint, file)
    if contract:
        (folder / "theirs.pt.contract.json").write_text(json.dumps(contract))
    return file


def loaded(start):
    backbone = architectures.build_backbone(start.network).eval()
    _, unexpected = backbone.load_state_dict(start.weights, strict=False)
    assert not unexpected
    return backbone


def perturbed(network):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


@pytest.mark.slow
def test_monais_self_supervised_swin_encoder_sees_what_it_saw_then(tmp_path):
    """Its file holds swinViT alone, with older names of the perceptron, heads of its tasks, and input from 0 to 1."""
    theirs = perturbed(SwinUNETR(in_channels=1, out_channels=2, feature_size=12)).swinViT
    names = {f"module.{name}".replace(".mlp.linear", ".mlp.fc"): w for name, w in theirs.state_dict().items()}
    heads = {"module.rotation_head.weight": torch.randn(4, 192), "module.conv.0.bias": torch.randn(3)}
    file = saved(tmp_path, {"epoch": 3, "state_dict": names | heads}, MONAI | {"input_range": [0.0, 1.0]})
    start = open_foreign(file, WINDOW)
    assert start.network == NetworkConfig("swin_unetr", (12, 12, 24, 48, 96, 192), window_hu=(-500.0, 500.0))
    assert set(start.skipped) == {"rotation_head.weight", "conv.0.bias"}
    assert len(start.weights) == len(names) and all(not name.startswith("swinViT.") for name in start.missing)
    image = torch.rand(1, 1, 32, 32, 64) * 2 - 1
    with torch.no_grad():
        for ours, known in zip(loaded(start).swinViT(image), theirs((image + 1) / 2), strict=True):
            torch.testing.assert_close(ours, known, rtol=1e-3, atol=1e-4)


def nnunet(name, **more):
    nets = pytest.importorskip(
        "dynamic_network_architectures.architectures.unet",
        reason="dynamic-network-architectures is not installed; pip install -e '.[nnunet]'",
    )
    return perturbed(
        getattr(nets, name)(
            1, 3, (4, 6, 8), torch.nn.Conv3d, (3, 3, 3), (1, 2, 2), num_classes=2, conv_bias=True,
            norm_op=torch.nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=torch.nn.LeakyReLU, **more,
        )
    )  # fmt: skip


def plan(spacing):
    return {"pretrain_plan": {"configurations": {"a": {"spacing": spacing, "patch_size": [16, 16, 16]}}}}


@pytest.mark.parametrize(
    ("name", "more", "architecture"),
    [
        ("PlainConvUNet", {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2}, "dynunet"),
        ("ResidualEncoderUNet", {"n_blocks_per_stage": (1, 3, 4), "n_conv_per_stage_decoder": 1}, "resenc_unet"),
    ],
)
def test_nnssl_networks_compute_the_same_with_their_axes_turned(tmp_path, name, more, architecture):
    theirs = nnunet(name, **more)
    checkpoint = {"network_weights": theirs.state_dict(), "nnssl_adaptation_plan": plan([3.0, 2.0, 1.0])}
    start = open_foreign(saved(tmp_path, checkpoint), WINDOW)
    assert start.network.architecture == architecture and start.network.filters == (4, 6, 8)
    assert start.contract.spacing_mm == (1.0, 2.0, 3.0) and start.missing == ()
    assert ("32 of 32 weights of dynunet" in start.told()) == (architecture == "dynunet")
    image = torch.randn(1, 1, 8, 12, 16)
    with torch.no_grad():
        features = loaded(start)(image)[-1]
        kernel, bias = theirs.decoder.seg_layers[-1].weight, theirs.decoder.seg_layers[-1].bias
        ours = torch.nn.functional.conv3d(features, kernel, bias)
        if architecture == "dynunet":  # which has no biases at its transposed convolutions
            for up in theirs.decoder.transpconvs:
                up.bias.zero_()
        torch.testing.assert_close(
            ours, theirs(image.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2), rtol=1e-3, atol=1e-4
        )


def test_kernels_that_were_made_for_the_spacing_are_known(tmp_path):
    network = NetworkConfig(filters=(4, 6, 8), kernel_spacing_mm=(1.0, 1.0, 5.0), window_hu=(-500.0, 500.0))
    theirs = perturbed(architectures.architecture(network).build(network, 2))
    start = open_foreign(saved(tmp_path, theirs.state_dict(), MONAI | {"spacing_mm": [1.0, 1.0, 5.0]}), WINDOW)
    assert start.network == network and not start.missing
    assert like(Config(), start.file).network.kernel_spacing_mm == (1.0, 1.0, 5.0)


@pytest.fixture
def segresnet():
    return perturbed(SegResNet(3, 8, in_channels=1, out_channels=2, blocks_down=(1, 2, 4), blocks_up=(1, 1)))


def test_a_segresnet_within_wrappers_is_taken_over_but_its_output_layer(tmp_path, segresnet):
    names = {f"module.backbone.{name}": w for name, w in segresnet.state_dict().items()}
    start = open_foreign(saved(tmp_path, {"net": names}, MONAI), WINDOW)
    image = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        features = loaded(start)(image)[-1]
        torch.testing.assert_close(segresnet.conv_final[2](features), segresnet(image))
    assert start.skipped == ("conv_final.2.conv.bias", "conv_final.2.conv.weight") and start.missing == ()


def test_weights_of_other_shapes_are_skipped_and_said(tmp_path):
    theirs = DynUNet(3, 2, 1, [3, 3, 3], [1, 2, 2], [2, 2], filters=(4, 6, 8), norm_name=("INSTANCE", {"affine": True}))
    start = open_foreign(saved(tmp_path, theirs.state_dict(), MONAI), WINDOW)
    assert "input_block.conv1.conv.weight (4, 2, 3, 3, 3)" in start.skipped
    assert start.missing == ("input_block.conv1.conv.weight",)
    assert "1 random (input_block.conv1.conv.weight)" in start.told()


@pytest.mark.parametrize(
    ("contract", "says"),
    [
        (None, r"does not say how it was shown CT; write theirs.pt.contract.json beside it"),
        (MONAI | {"orientation": "LPS"}, "orientation is 'LPS'"),
        (MONAI | {"window_hu": [500.0, -500.0]}, "does not rise"),
        (MONAI | {"input_range": [0.0, 1.0]}, "input_range is 0 to 1, which segresnet cannot be brought from"),
        (MONAI | {"window_hu": None}, "segresnet does not normalise its input"),
    ],
)
def test_a_contract_that_is_missing_or_cannot_be_kept_is_refused(tmp_path, segresnet, contract, says):
    with pytest.raises(RunError, match=says) as error:
        open_foreign(saved(tmp_path, segresnet.state_dict(), contract), WINDOW)
    assert "\n" not in str(error.value)


def test_what_a_checkpoint_says_of_itself_and_what_lies_beside_it_must_agree(tmp_path, segresnet):
    checkpoint = {"network_weights": segresnet.state_dict(), "nnssl_adaptation_plan": plan([3.0, 2.0, 1.0])}
    file = saved(tmp_path, checkpoint, MONAI | {"axes": "zyx"})
    with pytest.raises(RunError, match=r"spacing_mm is \(1.0, 2.0, 3.0\) in the checkpoint and \(1.5, 1.5, 2.0\)"):
        open_foreign(file, WINDOW)


def test_another_spacing_than_it_was_shown_is_refused(tmp_path, segresnet):
    file = saved(tmp_path, segresnet.state_dict(), MONAI)
    assert like(Config(), file).finetune.spacing_mm == (1.5, 1.5, 2.0)
    with pytest.raises(RunError, match=r"was shown CT at 1.5 x 1.5 x 2 mm, not finetune.spacing_mm 3 x 3 x 3"):
        like(replace(Config(), {"finetune.spacing_mm": [3.0, 3.0, 3.0]}), file)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("content", ["trap", b"cut", {"weights": {"a": torch.zeros(2)}}, [1, 2]])
def test_code_and_what_is_no_network_is_refused(tmp_path, content):
    file = saved(tmp_path, {"state_dict": {}, "x": Trap(tmp_path / "ran")} if content == "trap" else content, MONAI)
    if isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(RunError) as error:
        open_foreign(file, WINDOW)
    assert not (tmp_path / "ran").exists() and "\n" not in str(error.value)


def test_a_trial_begins_from_a_checkpoint_of_others_and_says_what_is_not_known(tmp_path, segresnet, data, capsys):
    file = saved(tmp_path, segresnet.state_dict(), MONAI | {"spacing_mm": None})
    settings = {"finetune.steps": 1, "finetune.patch_size": [24, 24, 24], "finetune.learning_rate": 1e-12}
    finetune(replace(Config(), settings | {"budget.fraction": 0.5}), data=data, start=file, run=tmp_path / "run")
    facts = RunRecord.load(tmp_path / "run")
    assert facts.start_name == "theirs.pt" and "which scans it has seen is not known" in facts.warnings["start"]
    assert NetworkRecord.load(tmp_path / "run").architecture == "segresnet"
    assert NetworkRecord.load(tmp_path / "run").window_hu == (-500.0, 500.0)
    report = json.loads((tmp_path / "run" / "start.json").read_text())
    assert report["missing"] == [] and report["skipped"] == ["conv_final.2.conv.bias", "conv_final.2.conv.weight"]
    assert "weights of segresnet matched" in capsys.readouterr().err
