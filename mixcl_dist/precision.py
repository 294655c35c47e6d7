"""Which arithmetic a device does well: bfloat16 products where the hardware has them, float32 elsewhere."""

from __future__ import annotations

import torch


def autocast(device: torch.device) -> torch.autocast:
    """Context in which convolutions and products run in bfloat16 where `device` has it in hardware.

    On a CPU without AVX512-BF16 or AMX bfloat16 would be emulated and slower, so float32 stays.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device))


def row_dtype(device: torch.device) -> torch.dtype:
    """What the loss is given rows in: bfloat16 on a GPU that has it, whose tensor cores it then runs on.

    On a CPU the loss computes in float32, so there is nothing to gain.
    """
    return torch.bfloat16 if device.type == "cuda" and has_bfloat16(device) else torch.float32


def arithmetic(device: torch.device) -> str:
    """What a run says of its arithmetic."""
    return "bfloat16 autocast, float32 master weights" if has_bfloat16(device) else "float32"


@torch.compiler.assume_constant_result  # the compiler cannot look into what asks the hardware
def has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
