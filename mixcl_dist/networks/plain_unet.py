"""nnU-Net's PlainConvUNet, which computes what MONAI's DynUNet without residual blocks does: under other names, with
arrays in the order (z, y, x)."""

from __future__ import annotations


def plain_unet_names(levels: int) -> dict[str, list[str]]:
    """DynUNet's names → those of the same weights there, which list every layer twice, and the encoder's four times.

    Convolutions there have biases as well, which the normalisation behind them takes out again.
    """
    blocks = ["input_block", *(f"downsamples.{n}" for n in range(levels - 2)), "bottleneck"]
    encoder = {block: f"encoder.stages.{stage}.0" for stage, block in enumerate(blocks)}
    decoder = {f"upsamples.{n}.conv_block": f"decoder.stages.{n}" for n in range(levels - 1)}
    names = {f"upsamples.{n}.transp_conv.conv.weight": [f"decoder.transpconvs.{n}.weight"] for n in range(levels - 1)}
    for here, there in (encoder | decoder).items():
        for i in (0, 1):
            layer = f"{there}.convs.{i}"
            again = ["", "decoder."] if here in encoder else [""]
            parts = {f"conv{i + 1}.conv.weight": ("conv.weight", "all_modules.0.weight")}
            parts |= {f"norm{i + 1}.{w}": (f"norm.{w}", f"all_modules.1.{w}") for w in ("weight", "bias")}
            for ours, theirs in parts.items():
                names[f"{here}.{ours}"] = [f"{prefix}{layer}.{name}" for prefix in again for name in theirs]
    return names
