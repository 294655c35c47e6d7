"""A trained network as its run left it on disk, in MONAI's names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from mixcl_dist.config import Config, ConfigError, from_dict, replace
from mixcl_dist.errors import MixclError, RunError
from mixcl_dist.export.comparison import Comparison, compared
from mixcl_dist.networks import architectures
from mixcl_dist.records import ANEW, OF_NETWORK, DiceRecord, NetworkRecord, RunRecord, told
from mixcl_dist.settings import NetworkConfig

_USED = {"views": ("size",), "pretrain": ("steps",), "finetune": ("steps", "patch_size", "sliding_overlap")}


class ExportError(MixclError):
    """A run that cannot be exported as asked; the message is one line with the cure."""


@dataclass(frozen=True)
class Trained:
    """Weights under the public network's names, each once, and what a user of them must know."""

    run: Path
    facts: dict[str, Any]
    config: Config
    """The run's settings, with the network as network.json describes it; every value has its type and range."""
    classes: tuple[str, ...]
    dice: dict[str, Any] | None
    """What dice.json holds; None for a pre-training."""
    weights: dict[str, torch.Tensor]
    licence: str | None = None
    """Of the weights, by what the data's terms allow; None: no run records these."""
    comparison: Comparison | None = None
    """With other starts, in a few-label table or study."""

    @property
    def network(self) -> NetworkConfig:
        return self.config.network

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """Spacing that the network was trained at; None: every case at its own."""
        return self.config.finetune.spacing_mm

    @property
    def description(self) -> NetworkRecord:
        """What `mixcl predict` reads of an export."""
        known: dict[str, Any] = {"spacing_mm": self.spacing_mm, "classes": self.classes if self.is_segmentation else ()}
        if self.is_segmentation:
            known |= {"patch_size": tuple(self.patch_size), "sliding_overlap": self.config.finetune.sliding_overlap}
        return NetworkRecord.of(self.network, {}, **known)

    @property
    def is_segmentation(self) -> bool:
        """Whether it was fine-tuned and so has an output layer; otherwise it is the pre-trained backbone."""
        return self.facts["kind"] == "finetune"

    @property
    def architecture(self) -> ModuleType:
        """The module of `networks` that tells of the public network."""
        return architectures.architecture(self.network)

    @property
    def network_arguments(self) -> dict[str, Any]:
        """Its arguments; the number of outputs (background and classes) only where the output layer was trained."""
        arguments = self.architecture.arguments(self.network)
        return arguments | ({self.architecture.OUTPUTS: len(self.classes) + 1} if self.is_segmentation else {})

    @property
    def patch_size(self) -> list[int]:
        """Voxels of a patch in fine-tuning."""
        return list(self.config.finetune.patch_size)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights as the public network's `state_dict` names them, which may list layers a second time."""
        network = self.architecture.build(self.network, len(self.classes) + 1 if self.is_segmentation else 1)
        network.load_state_dict(self.weights, strict=False)
        return {
            name: tensor
            for name, tensor in network.state_dict().items()
            if self.is_segmentation or not name.startswith(self.architecture.HEAD)
        }


def open_trained(run: Path, licence: str | None = None, table: Path | None = None) -> Trained:
    """Read a finished run, whose weights are passed on under `licence`, and what `table` tells of it.

    Raises `ExportError` or `RunError` where its network is missing or broken.
    """
    record, config = RunRecord.load(run), _used_settings(run / "config.yaml")
    file = run / ("model.safetensors" if record.kind == "finetune" else "network.safetensors")
    if not file.is_file():
        raise ExportError(f"{file}: no network yet; {record.how_to_finish}")
    described, dice = NetworkRecord.load(run), DiceRecord.load_if_there(run)
    described.check(file)
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{file}: cannot be read ({error}); {ANEW}") from None
    config = _described(config, described, run)
    public = architectures.classifier_names(config.network)
    trained = Trained(
        run=run,
        facts=told(record),
        config=config,
        classes=described.classes,
        dice=dice.content() if dice else None,
        weights={public.get(name, name.removeprefix("backbone.")): stored[name] for name in stored},
        licence=licence,
        comparison=compared(run, table),
    )
    _check(trained, file)
    return trained


def _described(config: Config, described: NetworkRecord, run: Path) -> Config:
    """The settings, with the network and spacing of network.json."""
    network = {f"network.{key}": getattr(described, key) for key in OF_NETWORK}
    try:
        return replace(config, network | {"finetune.spacing_mm": described.spacing_mm})
    except ConfigError as error:
        raise ExportError(f"{run / described.FILE}: {error}; {described.CURE}") from None


def _used_settings(file: Path) -> Config:
    """The settings that an export names, of a run of any version; all others are the defaults."""
    try:
        tree = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{file}: cannot be read ({' '.join(str(error).split())}); {ANEW}") from None
    if not isinstance(tree, dict) or not all(isinstance(tree.get(section, {}), dict) for section in _USED):
        raise RunError(f"{file}: holds no sections of settings; {ANEW}")
    return from_dict(
        {
            section: {key: tree[section][key] for key in keys if key in tree.get(section, {})}
            for section, keys in _USED.items()
        }
    )


def _check(trained: Trained, file: Path) -> None:
    """Raise where the weights are not those of the network that the description names."""
    expected = architectures.expected(trained.network)
    if trained.is_segmentation:
        outputs = len(trained.classes) + 1
        shapes = [(outputs, trained.network.filters[0], 1, 1, 1), (outputs,)]
        names = architectures.classifier_names(trained.network).values()
        expected |= {name: torch.Size(shape) for name, shape in zip(names, shapes, strict=True)}
    wrong = sorted(expected.keys() ^ trained.weights.keys()) or sorted(
        name for name, shape in expected.items() if shape != trained.weights[name].shape
    )
    if wrong:
        raise ExportError(f"{file}: {wrong[0]} does not fit network.json; {ANEW}")
