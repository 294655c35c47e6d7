"""Which of the implementations computes: the fastest that a device can run."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "tiled", "triton")
OLDEST_TRITON = (3, 6)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_WIDTH = 1024

logger = logging.getLogger(__name__)


def choose(implementation: str, embeddings: Tensor) -> str:
    """ "tiled" or "triton"; "auto" is "triton" where it runs and "tiled" elsewhere.

    Raises:
        ValueError: for "triton" where it cannot run; it says why.
    """
    if implementation == "tiled" or (implementation == "auto" and embeddings.device.type == "cpu"):
        return "tiled"
    reason = obstacle(embeddings.device, embeddings.dtype, embeddings.shape[1])
    if reason and implementation == "triton":
        raise ValueError(f'implementation: "triton" {reason}; "auto" takes what runs here')
    if reason:
        _say_once(f'the mixed contrastive loss runs as plain PyTorch, as "triton" {reason}')
    return "tiled" if reason else "triton"


def obstacle(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the Triton kernels cannot run, None where they can."""
    if dtype not in TRITON_DTYPES:
        return f"takes float16, bfloat16 and float32, not {dtype}"
    if width > LARGEST_WIDTH:
        return f"takes at most {LARGEST_WIDTH} features, not {width}"
    version = _triton_version()
    if version is None:
        return "needs the package triton, which is not installed"
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
        return f"needs triton {'.'.join(map(str, OLDEST_TRITON))} or newer, not {version}"
    if is_interpreted():
        return None
    if device.type != "cuda":
        return f"needs a GPU, not a {device.type} tensor (TRITON_INTERPRET=1 runs it slowly on a CPU, for tests)"
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0 or higher, not {torch.cuda.get_device_name(device)}"
    return None


@functools.lru_cache
def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def is_interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU; it has to be switched on before the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels keep rows in: Triton's interpreter holds bfloat16 as bits, and would multiply those."""
    return torch.float32 if is_interpreted() and dtype == torch.bfloat16 else dtype


@functools.lru_cache
def _say_once(message: str) -> None:
    logger.warning(message)
