"""A trained network as its run left it on disk, in MONAI's names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.networks.nets import DynUNet
from safetensors import SafetensorError
from safetensors.torch import load_file

from mixcl_dist.config import NetworkConfig
from mixcl_dist.networks import dynunet
from mixcl_dist.run import RunError, read_json

_CLASSIFIER = {
    "classifier.weight": "output_block.conv.conv.weight",
    "classifier.bias": "output_block.conv.conv.bias",
}


class ExportError(ValueError):
    """A run that cannot be exported as asked; the message is one line with the cure."""


@dataclass(frozen=True)
class Trained:
    """Weights under DynUNet's names, and what a user of them must know."""

    run: Path
    facts: dict[str, Any]
    config: dict[str, Any]
    network: NetworkConfig
    spacing_mm: tuple[float, float, float] | None
    """Spacing that the network was trained at; None: every case at its own."""
    classes: tuple[str, ...]
    dice: dict[str, Any] | None
    """What dice.json holds; None for a pre-training."""
    weights: dict[str, torch.Tensor]

    @property
    def is_segmentation(self) -> bool:
        """Whether it was fine-tuned and so has an output layer; otherwise it is the pre-trained backbone."""
        return self.facts["kind"] == "finetune"

    @property
    def network_arguments(self) -> dict[str, Any]:
        """Arguments of DynUNet; `out_channels` (background and classes) only where the output layer was trained."""
        arguments = dynunet.arguments(self.network)
        return arguments | ({"out_channels": len(self.classes) + 1} if self.is_segmentation else {})

    @property
    def patch_size(self) -> list[int]:
        """Voxels of a patch in fine-tuning."""
        return list(self.config["finetune"]["patch_size"])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights as `DynUNet.state_dict()` names them: it registers every layer a second time under `skip_layers`."""
        network = DynUNet(**({"out_channels": 1} | self.network_arguments))
        network.load_state_dict(self.weights, strict=False)
        return {
            name: tensor
            for name, tensor in network.state_dict().items()
            if self.is_segmentation or not name.startswith("output_block.")
        }


def open_trained(run: Path) -> Trained:
    """Read a finished run; raises `ExportError` or `RunError` where its network is missing or broken."""
    facts, config = read_json(run / "run.json"), _read_config(run / "config.yaml")
    file = run / ("model.safetensors" if facts.get("kind") == "finetune" else "network.safetensors")
    if not file.is_file():
        raise ExportError(f"{file}: no network yet; let the run finish (mixcl {facts.get('kind')} … --run {run})")
    description = read_json(run / "network.json")
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{file}: cannot be read ({error}); the run must be made again") from None
    try:
        trained = Trained(
            run=run,
            facts=facts,
            config=config,
            network=NetworkConfig(
                architecture=description["architecture"],
                filters=tuple(description["filters"]),
                window_hu=tuple(description["window_hu"]),
            ),
            spacing_mm=tuple(description["spacing_mm"]) if description["spacing_mm"] else None,
            classes=tuple(description["classes"]),
            dice=read_json(run / "dice.json") if (run / "dice.json").is_file() else None,
            weights={_CLASSIFIER.get(name, name.removeprefix("backbone.")): stored[name] for name in stored},
        )
    except KeyError as error:
        raise ExportError(f"{run / 'network.json'}: {error} is missing; the run must be made again") from None
    _check(trained, file)
    return trained


def _check(trained: Trained, file: Path) -> None:
    """Raise where the weights are not those of the network that the description names."""
    expected = DynUNet(**({"out_channels": 1} | trained.network_arguments)).state_dict()
    names = {name for name in expected if not name.startswith("skip_layers.")}
    names -= set() if trained.is_segmentation else set(_CLASSIFIER.values())
    wrong = sorted(names ^ trained.weights.keys()) or sorted(
        name for name in names if expected[name].shape != trained.weights[name].shape
    )
    if wrong:
        raise ExportError(f"{file}: {wrong[0]} does not fit network.json; the run must be made again")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise RunError(f"{path}: cannot be read ({' '.join(str(error).split())}); the run must be made again") from None
