"""A network that segments, as a fine-tuning run or an export of one left it on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mixcl_dist.errors import RunError
from mixcl_dist.finetuning.segmenter import SegmentationNetwork
from mixcl_dist.finetuning.start import WEIGHTS
from mixcl_dist.networks.architectures import named_here, weights_file
from mixcl_dist.records import OF_NETWORK, DiceRecord, NetworkRecord, RunRecord
from mixcl_dist.run import read_config
from mixcl_dist.settings import FinetuneConfig, NetworkConfig
from mixcl_dist.weights import load, read_weights

BUNDLED = Path("models", "model.pt")
"""In a MONAI bundle."""


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
        config = network_config(self.description)
        network = SegmentationNetwork(config, len(self.classes))
        stored = read_weights(self.weights, cure=self.description.CURE)
        of_run = any(name.startswith("backbone.") for name in stored)
        problem = f"does not fit {self.description.FILE}"
        named = stored if of_run else named_here(config, stored)
        load(network, named, self.weights, problem, self.description.CURE)
        return network.eval().to(device)


def network_config(description: NetworkRecord) -> NetworkConfig:
    """Raises `RunError` for what is no network."""
    try:
        return NetworkConfig(**{key: getattr(description, key) for key in OF_NETWORK})
    except ValueError as error:
        raise RunError(f"{description.FILE}: {error}; {description.CURE}") from None


def open_model(folder: Path) -> Model:
    """Read what lies beside the weights; raises `RunError` for a folder that holds no network that segments."""
    if (folder / RunRecord.FILE).is_file():
        return _of_run(folder)
    bundled = (folder / BUNDLED).is_file()
    place = folder / BUNDLED.parent if bundled else folder
    if (place / NetworkRecord.FILE).is_file():
        description = NetworkRecord.load(place)
        names = (BUNDLED.name,) if bundled else (weights_file(network_config(description)), "model.safetensors")
        weights = next((place / name for name in names if (place / name).is_file()), place / names[0])
        return _model(folder.resolve().name, weights, description, FinetuneConfig())
    raise RunError(
        f"{folder}: neither a fine-tuning run nor an export of one; give the --run of mixcl finetune, or the --out of "
        "mixcl export --to monai, hf or bundle"
    )


def _of_run(run: Path) -> Model:
    record = RunRecord.load(run)
    if record.kind != "finetune":
        cure = f"fine-tune it first: mixcl finetune --data SOURCE --from {run} --scans N --run RUN"
        raise RunError(f"{run}: is a pre-training, which segments nothing; {cure}")
    if not (run / DiceRecord.FILE).is_file():
        raise RunError(f"{run}: has not finished; {record.how_to_finish}")
    return _model(record.name, run / WEIGHTS["finetune"], NetworkRecord.load(run), read_config(run).finetune)


def _model(name: str, weights: Path, description: NetworkRecord, settings: FinetuneConfig) -> Model:
    """`settings` say what is not written beside the network."""
    if not weights.is_file():
        raise RunError(f"{weights}: no such file; {description.CURE}")
    description.check(weights)
    if not description.classes:
        cure = "fine-tune the run that it is of, and export that"
        raise RunError(f"{weights.parent}: a network without classes, which segments nothing; {cure}")
    return Model(
        name=name,
        weights=weights,
        description=description,
        patch_size=description.patch_size or settings.patch_size,
        overlap=settings.sliding_overlap if description.sliding_overlap is None else description.sliding_overlap,
        surface_tolerance_mm=settings.surface_tolerance_mm,
    )
