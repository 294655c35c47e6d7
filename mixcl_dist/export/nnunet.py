"""nnU-Net: the network as a checkpoint that its trainer starts from, and one that nnssl's fine-tuning reads.

MONAI's DynUNet without residual blocks and PlainConvUNet of dynamic_network_architectures compute the same: two
times convolution 3×3×3, instance normalisation, leaky ReLU 0.01 a stage, the first with the stride. Only the names
differ, nnU-Net's arrays are (z, y, x), so the kernels are transposed, and its convolutions have biases: they are 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mixcl_dist.export.card import card
from mixcl_dist.export.trained import ExportError, Trained
from mixcl_dist.networks.plain_unet import plain_unet_names
from mixcl_dist.networks.spacing import levels

_IN_PROJECTION = ["encoder.stages.0.0.convs.0.all_modules.0", "encoder.stages.0.0.convs.0.conv"]

_USE = """\
**Encoder and decoder**: `plans.json` here holds the architecture as nnU-Net's plans have it. Write it into the
configuration that you train, and start from the checkpoint:

```bash
nnUNetv2_plan_and_preprocess -d DATASET_ID
python - nnUNet_preprocessed/DATASET/nnUNetPlans.json <<'PYTHON'
import json, sys
plans = json.load(open(sys.argv[1]))
plans["configurations"]["3d_fullres"].update(json.load(open("plans.json")))
json.dump(plans, open(sys.argv[1], "w"))
PYTHON
nnUNetv2_preprocess -d DATASET_ID -c 3d_fullres
nnUNetv2_train DATASET_ID 3d_fullres FOLD -pretrained_weights checkpoint_final.pth
```

**Encoder alone**: with an nnU-Net that has `nnUNetv2_preprocess_like_nnssl` (its repository's documentation calls it
fine-tuning from nnssl checkpoints; `nnUNetv2_preprocess_like_nnssl --help` says whether yours does):

```bash
nnUNetv2_plan_and_preprocess -d DATASET_ID
nnUNetv2_preprocess_like_nnssl -d DATASET_ID -n mixcl -pc checkpoint_final.pth -am {mode}
nnUNetv2_train_pretrained DATASET_ID 3d_fullres FOLD -p ptPlans__mixcl____… -tr PretrainedTrainer
```

Set `"overwrite_image_reader_writer": "NibabelIOWithReorient"` in the data set's `dataset.json`: it brings every image
to RAS, as in pre-training."""

_NOTES = """\
## What nnU-Net takes over

- By `-pretrained_weights` **encoder and decoder**, all but the output layers; by `nnUNetv2_train_pretrained` the
  encoder and its stem only.
- nnU-Net normalises CT by the mean and deviation of the data set's foreground, or by Z-score, after clipping. The first
  convolution is followed by an instance normalisation, which takes out scale and offset of the input, so what is left
  of the difference is which HU are clipped and that the border is padded with the mean, not with the middle of the
  window.
- Architecture: `PlainConvUNet`, two convolutions a stage, kernels in nnU-Net's axis order (z, y, x)."""


def write(trained: Trained, folder: Path) -> None:
    """Write checkpoint_final.pth, adaptation_plan.json, plans.json and README.md; raises `ExportError` for a network of
    other blocks."""
    if trained.network.architecture != "dynunet":
        raise ExportError(
            f"{trained.run}: {trained.network.architecture} is built of other blocks than nnU-Net's plain networks; "
            "pre-train with --network.architecture dynunet, or export to monai"
        )
    if trained.network.kernel_spacing_mm and any(1 in kernel for kernel in levels(trained.network).kernels):
        raise ExportError(
            f"{trained.run}: DynUNet's decoder has the kernels of the level below, nnU-Net's those of its own, which "
            "differ with network.kernel_spacing_mm; pre-train without it, or export to monai"
        )
    plan = adaptation_plan(trained)
    checkpoint = {"network_weights": public_weights(trained), "nnssl_adaptation_plan": plan, "citations": []}
    torch.save(checkpoint | {"trainer_name": "mixcl-dist"}, folder / "checkpoint_final.pth")
    for name, content in (("adaptation_plan", plan), ("plans", _configuration(trained, plan))):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    use = _USE.format(mode="like_pretrained" if trained.spacing_mm else "default_nnunet")
    (folder / "README.md").write_text(card(trained, f"{trained.facts['name']} for nnU-Net", use, _NOTES))


def public_weights(trained: Trained) -> dict[str, torch.Tensor]:
    """Encoder and decoder under PlainConvUNet's names, which list each tensor several times; kernels are (out, in, z,
    y, x), biases 0."""
    weights: dict[str, torch.Tensor] = {}
    for ours, names in plain_unet_names(len(trained.network.filters)).items():
        here = trained.weights[ours]
        there = here.permute(0, 1, 4, 3, 2).contiguous() if here.ndim == 5 else here
        weights |= dict.fromkeys(names, there)
        if here.ndim == 5:
            outputs = here.shape[1] if "transp_conv" in ours else here.shape[0]
            weights |= dict.fromkeys([f"{name.removesuffix('weight')}bias" for name in names], torch.zeros(outputs))
    return weights


def _configuration(trained: Trained, plan: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration in nnU-Net's plans the checkpoint asks for."""
    architecture = plan["architecture_plans"]
    names = {"arch_class_name": "network_class_name", "arch_kwargs": "arch_kwargs"}
    known = {names[key]: architecture[key] for key in names}
    imported = {"_kw_requires_import": architecture["arch_kwargs_requiring_import"]}
    spacing = {"spacing": list(reversed(trained.spacing_mm))} if trained.spacing_mm else {}
    patch = plan["recommended_downstream_patchsize"]
    return {"patch_size": patch, "architecture": known | imported} | spacing


def adaptation_plan(trained: Trained) -> dict[str, Any]:
    """What nnU-Net must know to build the network and find its parts; sizes and spacings as (z, y, x)."""
    spacing = list(reversed(trained.spacing_mm)) if trained.spacing_mm else None
    patch_size = list(reversed(trained.config.views.size))
    return {
        "architecture_plans": {
            "arch_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": _architecture(trained),
            "arch_kwargs_requiring_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "pretrain_plan": {"configurations": {"mixcl": {"spacing": spacing, "patch_size": patch_size}}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": list(reversed(trained.patch_size)),
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stages.0",
        "keys_to_in_proj": _IN_PROJECTION,
        "key_to_lpe": None,
    }


def _architecture(trained: Trained) -> dict[str, Any]:
    levels = len(trained.network.filters)
    return {
        "n_stages": levels,
        "features_per_stage": list(trained.network.filters),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * levels,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (levels - 1),
        "n_conv_per_stage": [2] * levels,
        "n_conv_per_stage_decoder": [2] * (levels - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"negative_slope": 0.01, "inplace": True},
    }
