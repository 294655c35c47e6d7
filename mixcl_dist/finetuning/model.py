"""A network that segments, as a fine-tuning run or an export of one left it on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mixcl_dist.config import FinetuneConfig, NetworkConfig
from mixcl_dist.finetuning.start import WEIGHTS
from mixcl_dist.networks.heads import SegmentationNetwork
from mixcl_dist.records import DiceRecord, NetworkRecord, RunError, RunRecord
from mixcl_dist.run import read_config
from mixcl_dist.weights import from_monai, load, read_weights

EXPORTS = (
    *(("network.json", "dynunet.pt"), ("config.json", "model.safetensors")),
    ("models/network.json", "models/model.pt"),
)
"""Description and weights in a folder of `mixcl export --to` monai, hf, bundle."""


@dataclass(frozen=True)
class Model:
    """What a user of a network that segments must know of it."""

    name: str
    weights: Path
    description: NetworkRecord
    patch_size: tuple[int, int, int]
    """Voxels of a window."""
    overlap: float
    """Smallest share of a window's edge that it has in common with the next one."""
    surface_tolerance_mm: float
    """Of the surface Dice."""

    @property
    def classes(self) -> tuple[str, ...]:
        return self.description.classes

    def network(self, device: torch.device) -> SegmentationNetwork:
        """The network on `device`; raises `RunError` where the weights are damaged, or those of another one."""
        known = {key: getattr(self.description, key) for key in ("architecture", "filters", "window_hu")}
        network = SegmentationNetwork(NetworkConfig(**known), len(self.classes))
        stored = read_weights(self.weights, cure=self.description.CURE)
        of_run = any(name.startswith("backbone.") for name in stored)
        problem = f"does not fit {self.description.FILE}"
        load(network, stored if of_run else from_monai(stored), self.weights, problem, self.description.CURE)
        return network.eval().to(device)


def open_model(folder: Path) -> Model:
    """Read what lies beside the weights; raises `RunError` for a folder that holds no network that segments."""
    if (folder / RunRecord.FILE).is_file():
        return _of_run(folder)
    for described, weights in EXPORTS:
        if (folder / described).is_file() and (folder / weights).is_file():
            return _model(
                folder.resolve().name, folder / weights, NetworkRecord.read(folder / described), FinetuneConfig()
            )
    raise RunError(
        f"{folder}: neither a fine-tuning run nor an export of one; give the --run of mixcl finetune, or the --out of "
        "mixcl export --to monai, hf or bundle"
    )


def _of_run(run: Path) -> Model:
    record = RunRecord.load(run)
    if record.kind != "finetune":
        cure = f"fine-tune it first: mixcl finetune --data SOURCE --from {run} --run RUN"
        raise RunError(f"{run}: is a pre-training, which segments nothing; {cure}")
    if not (run / DiceRecord.FILE).is_file():
        raise RunError(f"{run}: has not finished; fine-tune again")
    return _model(record.name, run / WEIGHTS["finetune"], NetworkRecord.load(run), read_config(run).finetune)


def _model(name: str, weights: Path, description: NetworkRecord, settings: FinetuneConfig) -> Model:
    """`settings` say what is not written beside the network."""
    if not weights.is_file():
        raise RunError(f"{weights}: no such file; {description.CURE}")
    description.check(weights)
    if not description.classes:
        raise RunError(f"{weights.parent}: a network without classes, which segments nothing; fine-tune it first")
    return Model(
        name=name,
        weights=weights,
        description=description,
        patch_size=description.patch_size or settings.patch_size,
        overlap=settings.sliding_overlap if description.sliding_overlap is None else description.sliding_overlap,
        surface_tolerance_mm=settings.surface_tolerance_mm,
    )
