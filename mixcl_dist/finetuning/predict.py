"""A network that segments, applied to every scan of a source.

OUT/labels/CASE.nii.gz                   classes on the grid of the case's files
OUT/segs/CASE.dcm                        the same as DICOM-SEG, where the case is a DICOM series
OUT/probabilities/CASE/K_CLASS.nii.gz    where they were asked for
OUT/slices/CASE.npz                      one slice for the page, of a few cases
OUT/cases/CASE.json                      written last: a case that has it is done
OUT/prediction.json                      the network, the scores, and what could not be segmented
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixcl_dist import __version__
from mixcl_dist.data_shards.building.processes import in_processes, in_this_process
from mixcl_dist.data_shards.building.spool import stamp_of
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.sources import Case, CaseError, open_source, read_image, read_label
from mixcl_dist.data_shards.storage.publishing import remove_unpublished
from mixcl_dist.data_shards.versions import versions_of
from mixcl_dist.data_shards.volume import Grid, Volume, shown
from mixcl_dist.errors import RunError
from mixcl_dist.finetuning.model import Model, open_model
from mixcl_dist.finetuning.outputs import Probabilities, write_nifti, write_seg
from mixcl_dist.finetuning.scoring import (
    Keeper,
    Overlays,
    SurfaceScore,
    dice_per_class,
    segment,
    summarise,
    summarise_surfaces,
    surfaces_per_class,
)
from mixcl_dist.finetuning.segmenter import SegmentationNetwork
from mixcl_dist.finetuning.task import Task
from mixcl_dist.jsonfiles import write_atomic
from mixcl_dist.precision import arithmetic
from mixcl_dist.progress import progress
from mixcl_dist.records import CasePrediction, PredictionRecord, Refused
from mixcl_dist.run import PACKAGES, held, machine, now

CASES_SHOWN = 12
MORE_MEMORY = "take a machine with more memory"
SIDES = frozenset({"left", "right", "l", "r", "lt", "rt"})


@dataclass(frozen=True)
class _Work:
    """What a process needs to know beside the case."""

    model: Path
    out: Path
    task: Task
    """Of no cases, as each process is told of its own."""
    digest: str
    """Of the network's weights."""
    mirror: bool
    probabilities: bool
    tolerance_mm: float
    shown: frozenset[str]
    workers: int


def predict(
    model: Path,
    data: Path,
    out: Path,
    *,
    probabilities: bool = False,
    mirror: bool = False,
    workers: int | None = None,
) -> PredictionRecord:
    """Segment every scan of the source `data` with the fine-tuned run or export `model`; returns `prediction.json`.

    Labels, and probabilities in parts of one where asked for, lie on the grid of the scans' own files. Where a scan
    has labels of the network's classes, Dice, surface Dice and HD95 are computed. `mirror` averages with what is found
    with left and right exchanged. `workers` processes (None: one for each GPU, or one) work side by side.
    What an interrupted prediction finished is kept. A scan that cannot be segmented is among `refused`, as is a file
    that could be one; the others go on. Raises `RunError` or `CaseError`, each one line with the cure.
    """
    opened = open_model(model)
    source = open_source(data)
    if mirror and (side := next((name for name in opened.classes if _is_sided(name)), None)):
        raise RunError(f"--mirror: {side} lies on one side, and would be averaged with the other's; leave it out")
    gpus = torch.cuda.device_count()
    workers = workers or max(1, gpus)
    asked = _asked(opened, model, data, source.cases, mirror, probabilities)
    with held(out, "--out"):
        began = _begun(out, asked)
        remove_unpublished(out)
        work = _Work(
            model=model,
            out=out,
            task=Task((), Catalogue(source.classes), opened.classes),
            digest=began.model_digest,
            mirror=mirror,
            probabilities=probabilities,
            tolerance_mm=began.surface_tolerance_mm,
            shown=frozenset(case.name for case in source.cases[:: max(1, -(-len(source.cases) // CASES_SHOWN))]),
            workers=workers,
        )
        known = [_refused("", one) for one in (*source.problems, *source.strays)]
        start = time.monotonic()
        refused = _run(work, source.cases)
        done = [CasePrediction.read(file) for case in source.cases if (file := _record_of(out, case.name)).is_file()]
        unscored = [Refused(case=case.case, where=case.file, problem=case.unscored) for case in done if case.unscored]
        record = dataclasses.replace(
            _scored(began, done),
            refused=(*known, *refused, *unscored),
            finished=now(),
            seconds=began.seconds + time.monotonic() - start,
        )
        record.save(out)
    return record


def _is_sided(name: str) -> bool:
    words = re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*", name)  # "vertebra_L1" has no side
    return not SIDES.isdisjoint(word.casefold() for word in words)


def _asked(
    opened: Model, model: Path, data: Path, cases: Sequence[Case], mirror: bool, probabilities: bool
) -> PredictionRecord:
    description = opened.description
    with opened.weights.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return PredictionRecord(
        model=opened.name,
        model_digest=digest,
        classes=opened.classes,
        window_hu=description.window_hu,
        spacing_mm=description.spacing_mm,
        patch_size=opened.patch_size,
        sliding_overlap=opened.overlap,
        mirror=mirror,
        probabilities=probabilities,
        data=str(data.resolve()),
        surface_tolerance_mm=opened.surface_tolerance_mm,
        mixcl_version=__version__,
        versions={"python": sys.version.split()[0]} | versions_of(PACKAGES),
        machine=machine(),
        arithmetic=arithmetic(device),
        started=now(),
        cases=tuple(case.name for case in cases),
    )


def _begun(out: Path, asked: PredictionRecord) -> PredictionRecord:
    """The record to go on with; raises `RunError` where the folder holds another prediction, or anything else."""
    earlier = PredictionRecord.load_if_there(out)
    if earlier is None:
        if any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise RunError(f"{out}: holds other files; give an empty or new --out")
        asked.save(out)
        return asked
    same = ("model_digest", "mirror", "probabilities", "data", "sliding_overlap", "spacing_mm", "window_hu")
    if differing := next((key for key in same if getattr(earlier, key) != getattr(asked, key)), None):
        what = {"model_digest": "model", "data": "--data"}.get(differing, differing)
        raise RunError(f"{out}: holds a prediction with another {what}; give another --out")
    begun = dataclasses.replace(asked, started=earlier.started, seconds=earlier.seconds)
    begun.save(out)
    return begun


def _run(work: _Work, cases: Sequence[Case]) -> list[Refused]:
    """Segment the cases that are not done; returns those that could not be."""
    todo = [case for case in cases if not _is_done(work, case)]
    elsewhere = in_this_process if work.workers == 1 else in_processes(min(work.workers, max(1, len(todo))))
    done = elsewhere(functools.partial(_predict_case, work), todo)
    refused = []
    total, before = len(cases), len(cases) - len(todo)
    for case, problem, died in progress(done, total=total, initial=before, desc="predict", unit="case"):
        if died:
            problem = CaseError(f"the process that segmented it died ({died})", where=case.files[0], cure=MORE_MEMORY)
        if problem:
            print(f"predict: {problem}", file=sys.stderr)
            refused.append(_refused(case.name, problem))
    return refused


def _refused(case: str, problem: CaseError) -> Refused:
    return Refused(case=case, where=shown(problem.where), problem=f"{problem.what}; {problem.cure}")


def _is_done(work: _Work, case: Case) -> bool:
    """Whether a case has a record, of its files as they are, and all files that the record tells of."""
    try:
        record = CasePrediction.read(_record_of(work.out, case.name))
    except RunError:
        return False
    sizes = {work.out / name: size for name, size in record.outputs.items()}
    return record.stamp == stamp_of(case, work.task.catalogue) and all(
        file.is_file() and file.stat().st_size == size for file, size in sizes.items()
    )


def _record_of(out: Path, case: str) -> Path:
    return out / "cases" / f"{case}.json"


def _predict_case(work: _Work, case: Case) -> CaseError | None:
    """Segment, write and score one case; returns why it cannot be done."""
    try:
        _predict_and_write(work, case)
    except CaseError as problem:
        return problem
    except (MemoryError, torch.OutOfMemoryError):
        cure = f"{'give fewer --workers, or ' if work.workers > 1 else ''}{MORE_MEMORY}"
        return CaseError("takes more memory than there is", where=case.files[0], cure=cure)
    return None


def _predict_and_write(work: _Work, case: Case) -> None:
    begin = time.monotonic()
    stamp = stamp_of(case, work.task.catalogue)
    volume, grid = read_image(case)
    written: dict[Path, int] = {}
    with ExitStack() as stack:
        kept = None
        if work.probabilities:
            kept = stack.enter_context(Probabilities(work.task.classes, volume.hu.shape, work.out))
        found = _segmented(work, volume, kept.keep if kept else None)
        if kept:
            written |= kept.write(work.out / "probabilities" / case.name, grid, case)
    for room in ("labels", "cases", "segs", "slices"):
        (work.out / room).mkdir(exist_ok=True)
    label = work.out / "labels" / f"{case.name}.nii.gz"
    written[label] = write_nifti(label, found, grid, case)
    if case.format == "dicom" and found.any():
        seg = work.out / "segs" / f"{case.name}.dcm"
        written[seg] = write_seg(seg, found, grid, case, work.task.classes, work.digest)
    truth, unscored = _truth(work.task, case, grid)
    dice, surfaces = _scores(work, case, found, truth, volume.spacing)
    if case.name in work.shown:
        overlays = Overlays()
        drawn = np.zeros_like(found) if truth is None else truth
        overlays.add(case.name, volume, drawn, found, _opened(work.model, work.digest).description.window_hu)
        file = work.out / "slices" / f"{case.name}.npz"
        write_atomic(file, overlays.encode())
        written[file] = file.stat().st_size
    count = np.bincount(found.ravel(), minlength=len(work.task.classes) + 1)
    millilitres = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
    CasePrediction(
        case=case.name,
        file=shown(case.files[0]),
        stamp=stamp,
        seconds=round(time.monotonic() - begin, 3),
        outputs={str(file.relative_to(work.out)): size for file, size in written.items()},
        volume_ml={name: round(count[k] * millilitres, 3) for k, name in enumerate(work.task.classes, start=1)},
        dice=dice,
        hd95_mm={name: None if score is None else score.hd95_mm for name, score in surfaces.items()},
        surface_dice={name: None if score is None else score.dice for name, score in surfaces.items()},
        unscored=unscored,
    ).write(_record_of(work.out, case.name))


def _segmented(work: _Work, volume: Volume, keep: Keeper | None) -> np.ndarray:
    model, (network, device) = _opened(work.model, work.digest), _network(work.model, work.digest, work.workers)
    return segment(
        network,
        volume,
        spacing_mm=model.description.spacing_mm,
        window_hu=model.description.window_hu,
        patch_size=model.patch_size,
        overlap=model.overlap,
        device=device,
        mirror=work.mirror,
        keep=keep,
    )


@functools.lru_cache(maxsize=1)
def _opened(model: Path, digest: str) -> Model:
    """Read once in each process, and again where the weights have changed."""
    return open_model(model)


@functools.lru_cache(maxsize=1)
def _network(model: Path, digest: str, workers: int) -> tuple[SegmentationNetwork, torch.device]:
    """The network of this process, on the GPU that is its own where there are several."""
    if gpus := torch.cuda.device_count():
        number = re.sub(r"\D", "", multiprocessing.current_process().name) or "0"
        device = torch.device("cuda", int(number) % gpus)
    else:
        device = torch.device("cpu")
        if workers > 1:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    return _opened(model, digest).network(device), device


def _truth(task: Task, case: Case, grid: Grid) -> tuple[np.ndarray | None, str]:
    """What was drawn, in the network's numbers, None where nothing to score; and why, where there are labels."""
    if not case.labels or not task.known(case).any():
        return None, ""
    try:
        return task.target(case, read_label(case, task.catalogue, *grid.upright)), ""
    except CaseError as problem:
        return None, f"its label: {problem.what}; {problem.cure}"


def _scores(
    work: _Work, case: Case, found: np.ndarray, truth: np.ndarray | None, spacing_mm: Sequence[float]
) -> tuple[dict[str, float | None], Mapping[str, SurfaceScore | None]]:
    if truth is None:
        return {}, {}
    classes, reliable = work.task.classes, case.reliable
    surfaces = surfaces_per_class(
        found, truth, classes, reliable, spacing_mm=spacing_mm, tolerance_mm=work.tolerance_mm
    )
    return dice_per_class(found, truth, classes, reliable), surfaces


def _scored(record: PredictionRecord, done: Sequence[CasePrediction]) -> PredictionRecord:
    """`record` with the scores of all cases that have any."""
    scored = [case for case in done if case.dice]
    if not scored:
        return record
    surfaces = {
        case.case: {
            name: None if hd95 is None else SurfaceScore(hd95, case.surface_dice[name] or 0.0)
            for name, hd95 in case.hd95_mm.items()
        }
        for case in scored
    }
    dice = summarise({case.case: case.dice for case in scored}, record.classes)
    others: dict[str, Any] = {**summarise_surfaces(surfaces, record.classes)}
    return dataclasses.replace(record, dice=dice, **others)
