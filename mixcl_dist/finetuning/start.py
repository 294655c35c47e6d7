"""What a trial starts from: random weights, or a finished run that kept to the trial's budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mixcl_dist.config import Config, ConfigError, replace
from mixcl_dist.finetuning.task import Task
from mixcl_dist.networks.heads import SegmentationNetwork
from mixcl_dist.records import NetworkRecord, RunError, RunRecord
from mixcl_dist.seen import KnownScans, Seen, leak, shared_scans
from mixcl_dist.weights import load_weights

WEIGHTS = {"pretrain": "network.safetensors", "finetune": "model.safetensors"}
"""Kind of a run that may be a start → the file with its backbone."""


def like(config: Config, start: Path) -> Config:
    """`config` with the architecture, HU window and (unless given) spacing of the network in `start`."""
    record = RunRecord.load(start)
    if record.finished is None:
        again = {"pretrain": f"go on with mixcl pretrain --run {start} --resume latest", "finetune": "fine-tune again"}
        raise RunError(f"{start}: has not finished; {again[record.kind]}")
    trained = NetworkRecord.load(start)
    overrides = {f"network.{key}": getattr(trained, key) for key in ("architecture", "filters", "window_hu")}
    if config.finetune.spacing_mm is None:
        overrides["finetune.spacing_mm"] = trained.spacing_mm
    try:
        return replace(config, overrides)
    except ConfigError as error:
        raise RunError(f"{start / trained.FILE}: {error}; {trained.CURE}") from None


def check_start(start: Path, task: Task, label_cases: Sequence[str], known: KnownScans) -> dict[str, list[str]]:
    """The task's cases that `start` has seen, by voxels, with the classes whose labels it read of them.

    Raises `RunError` where it has seen labels or images that this trial must not know (see `seen.leak`).
    """
    shared = shared_scans(Seen.load(start), known.of(task.cases))
    budget = task.labels_of(label_cases)
    if problem := leak(shared, held_out=task.held_out, budget=budget, classes=task.classes):
        raise RunError(f"{start}: {problem}")
    saw: defaultdict[str, set[str]] = defaultdict(set)
    for one in shared:
        saw[one.case] |= one.labels
    return {case: sorted(classes) for case, classes in sorted(saw.items())}


def initial_network(config: Config, start: Path | None, n_classes: int) -> SegmentationNetwork:
    """The network to train, its backbone loaded from `start`; raises `RunError`."""
    network = SegmentationNetwork(config.network, n_classes)
    if start is not None:
        weights = start / WEIGHTS[RunRecord.load(start).kind]
        NetworkRecord.load(start).check(weights)
        prefix = "backbone." if weights.name == WEIGHTS["finetune"] else ""
        problem = f"does not fit {start / 'network.json'}"
        load_weights(network.backbone, weights, problem=problem, cure="train it again", prefix=prefix)
    return network
