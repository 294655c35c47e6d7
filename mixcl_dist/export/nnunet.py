"""nnU-Net: the encoder as a checkpoint that its fine-tuning from self-supervised checkpoints reads.

MONAI's DynUNet without residual blocks and PlainConvUNet of dynamic_network_architectures compute the same: two
times convolution 3×3×3 without bias, instance normalisation, leaky ReLU 0.01 a stage, the first with the stride.
Only the names differ, and nnU-Net's arrays are (z, y, x), so the kernels are transposed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mixcl_dist.export.card import card
from mixcl_dist.export.trained import ExportError, Trained

_IN_PROJECTION = ["encoder.stages.0.0.convs.0.all_modules.0", "encoder.stages.0.0.convs.0.conv"]

_USE = """\
With an nnU-Net that has `nnUNetv2_preprocess_like_nnssl` (its repository's documentation calls it fine-tuning from
nnssl checkpoints; `nnUNetv2_preprocess_like_nnssl --help` says whether yours does):

```bash
nnUNetv2_plan_and_preprocess -d DATASET_ID
nnUNetv2_preprocess_like_nnssl -d DATASET_ID -n mixcl -pc checkpoint_final.pth -am {mode}
nnUNetv2_train_pretrained DATASET_ID 3d_fullres FOLD -p ptPlans__mixcl____… -tr PretrainedTrainer
```

Set `"overwrite_image_reader_writer": "NibabelIOWithReorient"` in the data set's `dataset.json`: it brings every image
to RAS, as in pre-training."""

_NOTES = """\
## What nnU-Net takes over

- The **encoder and its stem only**; the decoder starts from random weights there, so this is less than what MONAI
  users get from the same pre-training.
- nnU-Net **forces Z-score normalisation**, also for CT. The first convolution is followed by an instance
  normalisation, which takes out scale and offset of the input, so what is left of the difference is that HU outside
  the window are not clipped and that the border is padded with the mean, not with the middle of the window.
- Architecture: `PlainConvUNet`, two convolutions a stage, kernels in nnU-Net's axis order (z, y, x)."""


def write(trained: Trained, folder: Path) -> None:
    """Write checkpoint_final.pth, adaptation_plan.json and README.md; raises `ExportError` for a residual network."""
    if trained.network.architecture != "dynunet":
        raise ExportError(
            f"{trained.run}: {trained.network.architecture} is built of other blocks than nnU-Net's plain networks; "
            "pre-train with --network.architecture dynunet, or export to monai"
        )
    plan = adaptation_plan(trained)
    checkpoint = {"network_weights": encoder_weights(trained), "nnssl_adaptation_plan": plan, "citations": []}
    torch.save(checkpoint | {"trainer_name": "mixcl-dist"}, folder / "checkpoint_final.pth")
    (folder / "adaptation_plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    use = _USE.format(mode="like_pretrained" if trained.spacing_mm else "default_nnunet")
    (folder / "README.md").write_text(card(trained, f"{trained.facts['name']} for nnU-Net", use, _NOTES))


def encoder_weights(trained: Trained) -> dict[str, torch.Tensor]:
    """The encoder under PlainConvUNet's names, which list each tensor twice; kernels are (out, in, z, y, x)."""
    last = len(trained.network.filters) - 1
    blocks = ["input_block", *(f"downsamples.{i}" for i in range(last - 1)), "bottleneck"]
    weights: dict[str, torch.Tensor] = {}
    for stage, block in enumerate(blocks):
        for i in (0, 1):
            there = f"encoder.stages.{stage}.0.convs.{i}"
            kernel = trained.weights[f"{block}.conv{i + 1}.conv.weight"].permute(0, 1, 4, 3, 2).contiguous()
            weights |= {f"{there}.conv.weight": kernel, f"{there}.all_modules.0.weight": kernel}
            for name in ("weight", "bias"):
                value = trained.weights[f"{block}.norm{i + 1}.{name}"]
                weights |= {f"{there}.norm.{name}": value, f"{there}.all_modules.1.{name}": value}
    return weights


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
        "conv_bias": False,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"negative_slope": 0.01, "inplace": True},
    }
