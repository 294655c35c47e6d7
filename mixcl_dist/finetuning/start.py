"""What a trial starts from: random weights, a finished run that kept to its budget, or a checkpoint of others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mixcl_dist.config import Config, ConfigError, replace
from mixcl_dist.errors import RunError
from mixcl_dist.finetuning.foreign import Foreign, open_foreign
from mixcl_dist.finetuning.segmenter import SegmentationNetwork
from mixcl_dist.finetuning.task import Task
from mixcl_dist.records import ANEW, OF_NETWORK, NetworkRecord, RunRecord
from mixcl_dist.seen import KnownScans, Seen, Shared, leak, one_patient, shared_scans
from mixcl_dist.weights import load_weights

WEIGHTS = {"pretrain": "network.safetensors", "finetune": "model.safetensors"}
"""Kind of a run that may be a start → the file with its backbone."""


def like(config: Config, start: Path) -> Config:
    """`config` with the architecture, HU window and (unless given) spacing of the network in `start`, a run's folder or
    the checkpoint of others, whose spacing has to be kept to."""
    if start.is_file():
        return _like_foreign(config, open_foreign(start, config.network.window_hu))
    record = RunRecord.load(start)
    if record.finished is None:
        raise RunError(f"{start}: has not finished; {record.how_to_finish}")
    trained = NetworkRecord.load(start)
    overrides = {f"network.{key}": getattr(trained, key) for key in OF_NETWORK}
    if config.finetune.spacing_mm is None:
        overrides["finetune.spacing_mm"] = trained.spacing_mm
    try:
        return replace(config, overrides)
    except ConfigError as error:
        raise RunError(f"{start / trained.FILE}: {error}; {trained.CURE}") from None


def _like_foreign(config: Config, start: Foreign) -> Config:
    spacing, asked = start.contract.spacing_mm, config.finetune.spacing_mm
    if spacing and asked and not np.allclose(spacing, asked, rtol=1e-3):
        shown = [" x ".join(f"{mm:g}" for mm in each) for each in (spacing, asked)]
        raise RunError(
            f"{start.file}: was shown CT at {shown[0]} mm, not finetune.spacing_mm {shown[1]}; leave that out"
        )
    overrides = {f"network.{key}": getattr(start.network, key) for key in OF_NETWORK}
    return replace(config, overrides | {"finetune.spacing_mm": asked or spacing})


def start_name(start: Path | None) -> str:
    """What a report calls it."""
    if start is None:
        return "scratch"
    return start.name if start.is_file() else RunRecord.load(start).name


def seen_by(start: Path) -> Seen:
    """What a start has seen; of the checkpoint of others nothing is known."""
    return Seen((), ()) if start.is_file() else Seen.load(start)


def check_start(
    start: Path,
    task: Task,
    label_cases: Sequence[str],
    known: KnownScans,
    distinct: Sequence[tuple[str, str]] = (),
) -> tuple[dict[str, list[str]], list[Shared]]:
    """The task's cases that `start` has seen, by voxels, with the classes whose labels it read of them, and what looks
    like one of its scans and is of another patient, as a person says in `distinct` (`budget.distinct_patients`).

    Raises `RunError` where it has seen labels or images that this trial must not know (see `seen.leak`).
    """
    shared = shared_scans(seen_by(start), known.of(task.cases))
    budget = task.labels_of(label_cases)
    if problem := leak(shared, held_out=task.held_out, budget=budget, classes=task.classes, distinct=distinct):
        raise RunError(f"{start}: {problem}")
    saw: defaultdict[str, set[str]] = defaultdict(set)
    kept = one_patient(shared, distinct)
    for one in kept:
        saw[one.case] |= one.labels
    return {case: sorted(classes) for case, classes in sorted(saw.items())}, [one for one in shared if one not in kept]


def initial_network(config: Config, start: Path | None, n_classes: int) -> SegmentationNetwork:
    """The network to train, its backbone loaded from `start`; raises `RunError`."""
    network = SegmentationNetwork(config.network, n_classes)
    if start is not None and start.is_file():
        network.backbone.load_state_dict(open_foreign(start, config.network.window_hu).weights, strict=False)
    elif start is not None:
        weights = start / WEIGHTS[RunRecord.load(start).kind]
        NetworkRecord.load(start).check(weights)
        prefix = "backbone." if weights.name == WEIGHTS["finetune"] else ""
        problem = f"does not fit {start / 'network.json'}"
        load_weights(network.backbone, weights, problem=problem, cure=ANEW, prefix=prefix)
    return network
