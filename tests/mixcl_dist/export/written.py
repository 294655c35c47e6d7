"""Run folders with networks of random weights, and what a card's snippet does with their exports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from mixcl_dist.config import Config, replace, to_yaml

FILTERS = (4, 6, 8, 10)
CLASSES = ["liver", "left_kidney"]
PATCH = (16, 24, 32)


def write_run(
    folder: Path,
    network: torch.nn.Module,
    kind: str,
    architecture: str = "dynunet",
    filters: Sequence[int] = FILTERS,
    patch_size: Sequence[int] = PATCH,
) -> Path:
    folder.mkdir()
    pretraining = kind == "pretrain"
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, folder / ("network.safetensors" if pretraining else "model.safetensors"))
    settings = {"finetune.patch_size": patch_size, "views.size": (16, 16, 24), "network.filters": FILTERS}
    (folder / "config.yaml").write_text(to_yaml(replace(Config(), settings)))
    description = {"architecture": architecture, "filters": filters, "window_hu": [-900, 700]}
    description |= {"spacing_mm": [1.0, 2.0, 3.0] if pretraining else None, "classes": CLASSES}
    (folder / "network.json").write_text(json.dumps(description))
    facts = {"kind": kind, "name": folder.name, "finished": None, "mixcl_version": "0.1.0", "label_cases": ["a", "b"]}
    facts |= {"start": None, "fraction": 0.05, "seed": 0, "validation_cases": ["c"], "training_cases": ["a", "b"]}
    (folder / "run.json").write_text(json.dumps(facts))
    if not pretraining:
        dice = {"classes": CLASSES, "cases": {}, "class_mean": {"liver": 0.9, "left_kidney": None}, "mean": 0.9}
        (folder / "dice.json").write_text(json.dumps(dice))
    return folder


def perturbed(network: torch.nn.Module) -> torch.nn.Module:
    """Scales and offsets of normalisation start at 1 and 0: moved, so that losing them would show."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def run_snippet(folder: Path, then: str) -> None:
    """Execute the card's Python snippet in its folder, and `then` after it."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code
    subprocess.run([sys.executable, "-c", code[1] + then], cwd=folder, check=True)
