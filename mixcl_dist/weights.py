"""Weights that a run left on disk, read into a network."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mixcl_dist.records import RunError


def load_weights(module: nn.Module, file: Path, *, problem: str, cure: str, prefix: str = "") -> None:
    """Load all of `module` from a safetensors file, whose names begin with `prefix` where one is given.

    Raises `RunError`, in one line with `problem` and `cure`, where the file cannot be read, is of another network, or
    holds what is no number: nothing can be learnt from there.
    """
    try:
        stored = load_file(file).items()
        weights = {name.removeprefix(prefix): w for name, w in stored if name.startswith(prefix)}
        module.load_state_dict(weights)
        if spoilt := [name for name, w in weights.items() if not w.isfinite().all()]:
            raise RuntimeError(f"{spoilt[0]} is not finite")
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise RunError(f"{file}: {problem} ({reason}); {cure}") from None
