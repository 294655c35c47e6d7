"""One segmentation trial: cases, a label budget and a start → Dice per class and case."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mixcl_dist.config import Config
from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.data_shards.sources import Case
from mixcl_dist.data_shards.volume import Volume
from mixcl_dist.errors import RunError
from mixcl_dist.finetuning.cases import Cases
from mixcl_dist.finetuning.crops import CropBatch, Crops, LabelledVolume
from mixcl_dist.finetuning.foreign import open_foreign
from mixcl_dist.finetuning.interrupted import UNFINISHED, Learning
from mixcl_dist.finetuning.marginal import marginal_loss
from mixcl_dist.finetuning.scoring import (
    Overlays,
    dice_per_class,
    segment,
    summarise,
    summarise_surfaces,
    surfaces_per_class,
)
from mixcl_dist.finetuning.segmenter import LearningNetwork, SegmentationNetwork
from mixcl_dist.finetuning.start import WEIGHTS, check_start, initial_network, like, seen_by, start_name
from mixcl_dist.finetuning.task import Task, budgeted, open_task
from mixcl_dist.jsonfiles import append_line, write_atomic, write_lines
from mixcl_dist.linear import Voxels, fit, sample
from mixcl_dist.networks.architectures import check_size
from mixcl_dist.precision import arithmetic, autocast
from mixcl_dist.progress import progress
from mixcl_dist.records import CURVE, CurvePoint, DiceRecord, FinetuneRecord, NetworkRecord, Scores, read_curve
from mixcl_dist.run import Run, held
from mixcl_dist.schedule import warmup_cosine
from mixcl_dist.seen import KnownScans, Seen, Shared, check_split, told_apart
from mixcl_dist.settings import FinetuneConfig

GRADIENT_NORM = 1.0
FITTED_CROPS = 16
"""That the classifiers are fitted to before the first step."""
Watch = Callable[[int, float, LearningNetwork], float | None]
"""Called with the step, the seconds spent on learning, and the network with the average of the weights; returns its
mean Dice."""
Report = Callable[[int, float | None], None]
"""Called with the step and the mean Dice of every point of the curve."""


def finetune(
    config: Config,
    *,
    data: Path,
    start: Path | None,
    run: Path,
    final: bool = False,
    resume: bool = False,
    report: Report = lambda step, dice: None,
    cache: Path | None = None,
) -> DiceRecord:
    """Train a segmentation network on the budgeted cases of `data`, and score it.

    It is scored on the development cases (`budget.development`), so that whatever is chosen by scores is chosen on
    them; on the validation cases where there are none, or where it is a `final` figure after which nothing is chosen.
    `start` is a finished run, of pre-training or of fine-tuning (supervised pre-training), or a checkpoint of others
    (see `foreign`), whose backbone, architecture, HU window and spacing are taken over; None starts from scratch by the
    same recipe. A run that has
    seen a validation or development scan, or labels outside the budget, is refused, and so is a labelled case whose
    voxels are those of such a scan under another name.
    The mean is over the classes that some labelled case of the budget annotates and shows, in at least one voxel: of
    others there was nothing to learn. All arms of a table's cell share the budget, and so the classes.
    Everything is left in the folder `run`; returns its `dice.json`, which is written last and so marks a finished
    trial. With `resume` it can be gone on with from each point of the curve: called again, it does so, and comes to the
    same result on a CPU. `report` hears of every point, of those before an interruption again. `cache` is a folder in
    which trials keep what they have read for each other.
    Raises `RunError`, `ConfigError` or `CaseError`, each one line with the cure.
    """
    with held(run, "--run"):
        how: dict[str, Any] = {"final": final, "resume": resume, "report": report, "cache": cache}
        return _finetune(config, data=data, start=start, run=run, **how)


def _finetune(
    config: Config,
    *,
    data: Path,
    start: Path | None,
    run: Path,
    final: bool,
    resume: bool,
    report: Report,
    cache: Path | None,
) -> DiceRecord:
    if (run / DiceRecord.FILE).exists():
        raise RunError(f"{run}: holds a finished trial; give another --run")
    task = open_task(data, config)
    scored: Literal["validation", "development"] = "validation" if final or not task.kept_back else "development"
    cases = task.validation if scored == "validation" else task.development
    label_cases = budgeted(task, config.budget)
    known = KnownScans(run.parent)
    alike = check_split(task.cases, label_cases, task.held_out, known)
    history = _History(_own(task, label_cases, known))
    if start is not None:
        config = like(config, start)
        saw, apart = check_start(start, task, label_cases, known, config.budget.distinct_patients)
        history = _History(history.seen.merged(seen_by(start)), start, saw, apart)
    check_size("finetune.patch_size", config.network, config.finetune.patch_size)
    reading = Cases(task, cache)
    volumes, unshown = _training_volumes(config, task, reading, label_cases)
    torch.manual_seed(config.budget.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = initial_network(config, start, len(task.classes)).to(device)
    facts = _facts(run.name, config, task, history, label_cases, unshown)
    names = tuple(case.name for case in cases)
    facts = dataclasses.replace(facts, scored=scored, scored_cases=names, arithmetic=arithmetic(device))
    record = Run.create(run, config, facts)
    known.save()
    _tell(record, config, history, alike, unshown)
    watch = _watch(config, task, reading, unshown, run, device)
    network = _train(network, config, volumes, record, watch, device, resume=resume, report=report)
    _save(network, config, task, run)
    scores, surfaces, overlays = _score(network, config, task, reading, cases, device)
    dice = DiceRecord(
        classes=scores.classes,
        cases=scores.cases,
        class_mean=scores.class_mean,
        mean=mean_dice(scores.class_mean, unshown),
        scored=scored,
        **surfaces,
    )
    write_atomic(run / "overlays.npz", overlays.encode())
    record.finish()
    dice.save(run)
    (run / UNFINISHED).unlink(missing_ok=True)
    return dice


@dataclass(frozen=True)
class _History:
    """What a trial and its start have seen."""

    seen: Seen
    start: Path | None = None
    start_saw: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Cases of the task, under whatever name → classes whose labels the start read of them."""
    apart: Sequence[Shared] = ()
    """What only looks like a case of the task, as a person says."""


def _facts(
    name: str, config: Config, task: Task, history: _History, label_cases: Sequence[str], unshown: Sequence[str]
) -> FinetuneRecord:
    """What `run.json` tells of the data, the budget and the start."""
    return FinetuneRecord(
        name=name,
        start=None if history.start is None else str(history.start.resolve()),
        start_name=start_name(history.start),
        training_cases=tuple(scan.name for scan in history.seen.scans),
        label_cases=tuple(label_cases),
        fraction=config.budget.fraction,
        scans=config.budget.scans,
        seed=config.budget.seed,
        validation_cases=tuple(case.name for case in task.validation),
        classes=task.classes,
        unshown_classes=tuple(unshown),
        start_saw={name: tuple(classes) for name, classes in history.start_saw.items()},
        distinct_patients=tuple((*one.pair, one.distance or 0.0) for one in history.apart),
        spacing_mm=config.finetune.spacing_mm,
    )


def _tell(record: Run, config: Config, history: _History, alike: str | None, unshown: Sequence[str]) -> None:
    """Keep what was seen beside the run, and warn of what whoever reads its scores must know."""
    history.seen.save(record.path)
    if unshown:
        print(f"finetune: no labelled case shows {', '.join(unshown)}: left out of the mean", file=sys.stderr)
    if alike:
        record.warn("split", alike)
    if history.start is not None and history.start.is_file():
        foreign = open_foreign(history.start, config.network.window_hu)
        foreign.record().save(record.path)
        record.warn("start", f"{foreign.told()}; which scans it has seen is not known, scored ones may be among them")
    if history.apart:
        record.warn("distinct_patients", told_apart(history.apart))


def _own(task: Task, label_cases: Sequence[str], known: KnownScans) -> Seen:
    """What a trial itself sees, its labelled cases."""
    labels = task.labels_of(label_cases)
    scans = known.of([case for case in task.cases if case.name in labels])
    return Seen(tuple(scans), tuple(labels[scan.name] for scan in scans))


def _training_volumes(
    config: Config, task: Task, reading: Cases, label_cases: Sequence[str]
) -> tuple[list[LabelledVolume], list[str]]:
    """The labelled cases as they are trained on, and the classes that none of them shows before it is resampled."""
    chosen = {case.name: case for case in task.cases}
    volumes, shown = [], np.zeros(IGNORED + 1, dtype=bool)
    for name in progress(label_cases, total=len(label_cases), desc="read", unit="case"):
        volume, shows = reading.training(chosen[name], config.finetune.spacing_mm)
        volumes.append(volume)
        shown |= shows
    return volumes, [name for k, name in enumerate(task.classes, start=1) if not shown[k]]


def mean_dice(class_mean: Mapping[str, float | None], unshown: Collection[str]) -> float | None:
    """The mean over the classes that were scored, but those in `unshown`."""
    values = [value for name, value in class_mean.items() if value is not None and name not in unshown]
    return float(np.mean(values)) if values else None


def _train(
    network: SegmentationNetwork,
    config: Config,
    volumes: Sequence[LabelledVolume],
    record: Run,
    watch: Watch,
    device: torch.device,
    *,
    resume: bool,
    report: Report,
) -> SegmentationNetwork:
    """Learn from the volumes; returns the average of the weights over the last steps."""
    settings = config.finetune
    crops = Crops(volumes, settings.patch_size, config.network.window_hu, config.budget.seed, device)
    learner = LearningNetwork(network, config.network).to(device)
    optimizer, schedule = _optimizer(learner, settings)
    kept = copy.deepcopy(learner).requires_grad_(False)
    weights = list(kept.parameters()), list(learner.parameters())
    learning = Learning(learner, kept, optimizer, schedule, crops)
    done, seconds = learning.load(record.path) if resume else (0, 0.0)
    if not done:
        _fit_classifiers(learner, crops)
        kept.load_state_dict(learner.state_dict())
    learner.train()
    _take_up(record, done, report)
    begin = time.monotonic()
    steps = range(done + 1, settings.steps + 1)
    for step in progress(steps, total=settings.steps, initial=done, desc="finetune", unit="step"):
        learner.coarse_share = kept.coarse_share = coarse_share(step, settings)
        loss = train_step(learner, optimizer, crops.batch(settings.batch_size))
        # At first the average is of few steps, so that the random start is soon forgotten.
        average = get_ema_multi_avg_fn(min(settings.average_decay, (1 + step) / (10 + step)))
        average(*weights, step)
        last = step == settings.steps
        if last or step % settings.log_every == 0:
            rate = float(schedule.get_last_lr()[0])
            spent = round(seconds + time.monotonic() - begin, 2)
            record.log(step, seconds=spent, loss=_finite(loss, step, record), learning_rate=rate)
        schedule.step()
        if last or step % settings.curve_every == 0:
            seconds += time.monotonic() - begin
            dice = watch(step, seconds, kept)
            if resume:
                learning.save(record.path, step, seconds)
            report(step, dice)
            begin = time.monotonic()
    return kept.segmenter


@torch.no_grad()
def _fit_classifiers(learner: LearningNetwork, crops: Crops) -> None:
    """Let the classifiers begin as logistic regression of the start's frozen features, which random ones would spoil
    (linear probing before fine-tuning: Kumar et al. 2022)."""
    found = []
    learner.eval()
    for number in range(FITTED_CROPS):
        batch = crops.batch(1)
        with autocast(batch.image.device):
            pyramid = learner.backbone(batch.image)
        label = batch.target[:, 0].to(torch.uint8).cpu().numpy()
        found.append(sample(pyramid, label, batch.known.cpu().numpy(), number))
    learner.set_classifiers(*fit(Voxels.joined(found)), pyramid)


def coarse_share(step: int, settings: FinetuneConfig) -> float:
    """What the coarser levels' logits are multiplied by in a step, from 1 down to 0."""
    return max(0.0, 1 - (step - 1) / (settings.coarse_fraction * settings.steps))


def _take_up(record: Run, step: int, report: Report) -> None:
    """Keep what was logged and told up to a step, and tell the latter again."""
    record.forget_metrics_after(step)
    curve = record.path / CURVE
    points = [point for point in read_curve(curve) if point.step <= step]
    if curve.exists():
        write_lines(curve, [dataclasses.asdict(point) for point in points])
    for point in points:
        report(point.step, point.mean)


def _watch(
    config: Config, task: Task, reading: Cases, unshown: Collection[str], run: Path, device: torch.device
) -> Watch:
    """A function that appends a point to the curve of Dice over steps, `curve.jsonl`, by the first development scans;
    without any it does nothing."""
    shown = task.development[: config.finetune.curve_scans]
    scans = [(case, reading.volume(case)) for case in shown]

    def watch(step: int, seconds: float, network: LearningNetwork) -> float | None:
        scores = {}
        for case, volume in scans:
            *_, scores[case.name] = _segmented(network, config, task, case, volume, device)
        if not scores:
            return None
        dice = summarise(scores, task.classes).class_mean
        point = CurvePoint(step=step, seconds=round(seconds, 2), mean=mean_dice(dice, unshown), dice=dice)
        append_line(run / CURVE, dataclasses.asdict(point))
        return point.mean

    return watch


def _optimizer(learner: LearningNetwork, settings: FinetuneConfig) -> tuple[AdamW, LambdaLR]:
    """The classifiers and the finest level learn at the full rate, deeper levels slower."""
    groups = [[*learner.classifier.parameters(), *learner.coarse.parameters()], *learner.backbone.levels()]
    rates = [settings.learning_rate * settings.level_decay ** max(0, depth - 1) for depth in range(len(groups))]
    optimizer = AdamW(
        [{"params": group, "lr": rate} for group, rate in zip(groups, rates, strict=True)],
        weight_decay=settings.weight_decay,
        fused=True,
    )
    return optimizer, LambdaLR(optimizer, warmup_cosine(settings.steps, settings.warmup_fraction, 0.0))


def train_step(network: LearningNetwork, optimizer: torch.optim.Optimizer, batch: CropBatch) -> Tensor:
    """Learn from one batch, or nothing where its gradient is not finite.

    Returns its loss (0-d, detached), for which the host has not waited.
    """
    with autocast(batch.image.device):
        logits = network(batch.image)
    loss = marginal_loss(logits.float(), batch.target, batch.known)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_NORM)
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # AdamW's fused kernel looks at it
    optimizer.step()
    return loss.detach()


def _finite(loss: Tensor, step: int, record: Run) -> float:
    """The loss as it is logged; raises `RunError` where it is none, from which training never returns."""
    value = loss.item()
    if not math.isfinite(value):
        raise RunError(f"{record.path}: the loss is {value} at step {step}; lower finetune.learning_rate")
    return round(value, 5)


def _save(network: SegmentationNetwork, config: Config, task: Task, run: Path) -> None:
    weights = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
    content = save(weights)
    write_atomic(run / WEIGHTS["finetune"], content)
    NetworkRecord.of(
        config.network,
        {WEIGHTS["finetune"]: content},
        spacing_mm=config.finetune.spacing_mm,
        classes=task.classes,
        patch_size=config.finetune.patch_size,
        sliding_overlap=config.finetune.sliding_overlap,
    ).save(run)


def _score(
    network: SegmentationNetwork,
    config: Config,
    task: Task,
    reading: Cases,
    cases: Sequence[Case],
    device: torch.device,
) -> tuple[Scores, dict[str, Any], Overlays]:
    """Dice and surface scores of every one of `cases`, each in its own voxels, and slices for the report."""
    scores, surfaces, overlays = {}, {}, Overlays()
    for case in progress(cases, total=len(cases), desc="score", unit="case"):
        volume = reading.volume(case)
        prediction, truth, scores[case.name] = _segmented(network, config, task, case, volume, device)
        surfaces[case.name] = surfaces_per_class(
            prediction,
            truth,
            task.classes,
            case.reliable,
            spacing_mm=volume.spacing,
            tolerance_mm=config.finetune.surface_tolerance_mm,
        )
        overlays.add(case.name, volume, truth, prediction, config.network.window_hu)
    return summarise(scores, task.classes), summarise_surfaces(surfaces, task.classes), overlays


def _segmented(
    network: SegmentationNetwork | LearningNetwork,
    config: Config,
    task: Task,
    case: Case,
    volume: Volume,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray, dict[str, float | None]]:
    """What the network finds in a labelled case and what was drawn, both in its own voxels, and Dice per class."""
    prediction = segment(
        network,
        volume,
        spacing_mm=config.finetune.spacing_mm,
        window_hu=config.network.window_hu,
        patch_size=config.finetune.patch_size,
        overlap=config.finetune.sliding_overlap,
        device=device,
    )
    assert volume.label is not None, "only labelled cases are scored"
    truth = task.target(case, volume.label)
    return prediction, truth, dice_per_class(prediction, truth, task.classes, case.reliable)
