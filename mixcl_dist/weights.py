"""Weights that lie on disk, read into a network."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mixcl_dist.errors import RunError


def load_weights(module: nn.Module, file: Path, *, problem: str, cure: str, prefix: str = "") -> None:
    """Load all of `module` from a safetensors file, whose names begin with `prefix` where one is given.

    Raises `RunError`, in one line with `problem` and `cure`, where the file cannot be read, is of another network, or
    holds what is no number: nothing can be learnt from there.
    """
    stored = read_weights(file, problem=problem, cure=cure).items()
    load(module, {name.removeprefix(prefix): w for name, w in stored if name.startswith(prefix)}, file, problem, cure)


def read_weights(file: Path, *, problem: str = "cannot be read", cure: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of one of `torch.save`, which holds nothing else; no code in it is run.

    Raises `RunError`.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        stored = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(stored, dict) and all(isinstance(w, Tensor) for w in stored.values()):
            return stored
        raise RuntimeError("no dictionary of tensors")
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RunError(f"{file}: {problem} ({_last_line(error)}); {cure}") from None


def load(module: nn.Module, weights: Mapping[str, Tensor], file: Path, problem: str, cure: str) -> None:
    """Load all of `module` from `weights`, those of `file`; raises as `load_weights` does."""
    try:
        module.load_state_dict(weights)
        if spoilt := [name for name, w in weights.items() if not w.isfinite().all()]:
            raise RuntimeError(f"{spoilt[0]} is not finite")
    except RuntimeError as error:
        raise RunError(f"{file}: {problem} ({_last_line(error)}); {cure}") from None


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
