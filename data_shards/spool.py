"""Stage 1 of a build: each case → its patches on this machine's disk, and a record of what became of it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from pydantic import TypeAdapter, ValidationError

from mixcl_dist.data_shards.build import BuildConfig, Progress
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.codec import digest, encode
from mixcl_dist.data_shards.manifest import HU_BINS, CaseRecord
from mixcl_dist.data_shards.patches import cut, pad_to, patch_origins
from mixcl_dist.data_shards.shard import write_shard
from mixcl_dist.data_shards.sources import Case, Source, read_case
from mixcl_dist.data_shards.storage import publish
from mixcl_dist.data_shards.volume import CaseError, Volume, crop_to_body

MAX_NAME = 80
"""Characters of a case name: with patch number and member it must fit into a USTAR header."""


@dataclass(frozen=True)
class Quarantined:
    """A `CaseError` as the quarantine list keeps it."""

    case: str | None
    """None for what could not even become a case."""
    file: str
    message: str
    cure: str

    @classmethod
    def of(cls, case: str | None, error: CaseError) -> Quarantined:
        return cls(case, str(error.where), error.what, error.cure)


@dataclass(frozen=True)
class Spooled:
    """A case whose patches lie ready in its own shard."""

    record: CaseRecord
    hu_histogram: tuple[int, ...]
    present: tuple[tuple[int, ...], ...]
    """Labels in each patch; none where the case has no label."""


Outcome = Spooled | Quarantined
_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Outcome)


def choose_cases(opened: Sequence[Source], splits: Sequence[str]) -> tuple[list[Case], list[Quarantined]]:
    """The cases of the wanted splits, and what their sources or their names forbid."""
    refused = [Quarantined.of(None, problem) for source in opened for problem in source.problems]
    chosen: dict[str, Case] = {}
    for case in (case for source in opened for case in source.cases if case.split in splits):
        if len(case.name) > MAX_NAME:
            error = _refused(case, f"case name {case.name} is longer than {MAX_NAME} characters", "rename it")
        elif case.name in chosen:
            error = _refused(case, f"case name {case.name} is taken by {chosen[case.name].files[0]}", "rename it")
        else:
            chosen[case.name] = case
            continue
        refused.append(Quarantined.of(case.name, error))
    return list(chosen.values()), refused


def spool_cases(
    cases: Sequence[Case], catalogue: Catalogue, config: BuildConfig, folder: Path, progress: Progress
) -> None:
    """Spool every case that has no outcome yet, in `config.workers` processes.

    A process that dies takes the whole pool with it. The cases then in hand are tried again one by one, so that only
    the deadly one is quarantined. Raises `OSError` when `folder` cannot be written.
    """
    work = partial(spool_case, catalogue=catalogue, config=config, folder=folder)
    waiting = deque(case for case in cases if _read_outcome(folder, case.name) is None)
    done = len(cases) - len(waiting)
    for _ in _spooled(waiting, work, config.workers, folder):
        done += 1
        progress(done, len(cases), "case")


def sort_outcomes(cases: Sequence[Case], folder: Path) -> tuple[list[Spooled], list[Quarantined]]:
    """The cases to be used, in the order of `cases`, and the others; of copies of a scan the first is used."""
    used: dict[str, Spooled] = {}
    refused: list[Quarantined] = []
    for case in cases:
        outcome = _read_outcome(folder, case.name)
        assert outcome is not None, f"{case.name} was spooled but left no outcome"
        if isinstance(outcome, Quarantined):
            refused.append(outcome)
        elif first := used.get(outcome.record.source_digest):
            error = _refused(case, f"has the same voxels as case {first.record.name}", "remove one of them")
            refused.append(Quarantined.of(case.name, error))
        else:
            used[outcome.record.source_digest] = outcome
    return list(used.values()), refused


def write_quarantine(path: Path, refused: Sequence[Quarantined]) -> None:
    with publish(path) as file:
        file.writelines(json.dumps(dataclasses.asdict(entry)).encode() + b"\n" for entry in refused)


def read_quarantine(path: Path) -> list[CaseError]:
    entries = [Quarantined(**json.loads(line)) for line in path.read_bytes().splitlines()]
    return [CaseError(entry.message, where=Path(entry.file), cure=entry.cure) for entry in entries]


def shard_of(folder: Path, case_name: str) -> Path:
    """The case's own shard, from which stage 2 draws."""
    return folder / f"{case_name}.tar"


def spool_case(case: Case, catalogue: Catalogue, config: BuildConfig, folder: Path) -> None:
    """Read, crop and cut `case`, write its patches to `folder`, and publish the outcome last.

    Whatever is wrong with the case becomes its outcome. Only a failure to write raises, as `OSError`.
    """
    samples: list[tuple[str, dict[str, bytes]]] = []
    try:
        volume = read_case(case, catalogue, config.spacing_mm)
        body = crop_to_body(volume, config.body_margin_mm)
        source_digest = _voxel_digest(volume)
        padded = pad_to(body, config.patch_size)
        origins = patch_origins(padded, config.patch_size, config.overlap, config.min_body_fraction)
        patches = [cut(padded, origin, config.patch_size) for origin in origins]
        for number, patch in enumerate(patches):
            samples.append((f"{case.name}_{number:04d}", _sample(case, volume, patch, source_digest)))
        if not samples:
            raise _refused(case, "every patch is almost only air", "lower build.min_body_fraction, or leave it out")
        record = CaseRecord(
            name=case.name,
            dataset=case.dataset,
            split=case.split,
            reliable=case.reliable,
            labelled=volume.label is not None,
            patches=len(samples),
            spacing_mm=volume.spacing,
            source_digest=source_digest,
        )
        present = tuple(() if patch.label is None else tuple(np.unique(patch.label).tolist()) for patch in patches)
        outcome: Outcome = Spooled(record, _hu_histogram(body.hu), present)
    except CaseError as error:
        outcome = Quarantined.of(case.name, error)
    except Exception as error:  # one unreadable file of a million must not end the build
        refusal = _refused(case, f"{type(error).__name__}: {error}", "see whether another program opens it")
        outcome = Quarantined.of(case.name, refusal)
    if isinstance(outcome, Spooled):
        write_shard(shard_of(folder, case.name), samples)
    _publish_outcome(folder, case.name, outcome)


def _sample(case: Case, volume: Volume, patch: Volume, source_digest: str) -> dict[str, bytes]:
    """The members of `patch`, which was cut from `volume`."""
    arrays = {"ct.b2": patch.hu} | ({} if patch.label is None else {"seg.b2": patch.label})
    payloads = {member: encode(array) for member, array in arrays.items()}
    description = {
        "case": case.name,
        "dataset": case.dataset,
        "split": case.split,
        "annotated": case.reliable,
        "shape": patch.hu.shape,
        "dtype": {member: array.dtype.name for member, array in arrays.items()},
        "spacing_mm": patch.spacing,
        "affine": patch.affine.tolist(),
        "offset_voxels": [round(index) for index in (np.linalg.inv(volume.affine) @ patch.affine)[:3, 3]],
        "source_digest": source_digest,
        "xxh3": {member: digest(payload) for member, payload in payloads.items()},
    }
    return {**payloads, "json": json.dumps(description).encode()}


def _voxel_digest(volume: Volume) -> str:
    """Labels and header stay out of it: a scan with other contours is still the same scan."""
    voxels = xxhash.xxh3_128(str(volume.hu.shape).encode())
    voxels.update(np.ascontiguousarray(volume.hu).data)
    return voxels.hexdigest()


def _hu_histogram(hu: np.ndarray) -> tuple[int, ...]:
    first, last, bins = HU_BINS
    inside = np.clip(hu.ravel(), first, last - 1)
    return tuple(np.histogram(inside, bins, (first, last))[0].tolist())


def _spooled(waiting: deque[Case], work: Callable[[Case], None], workers: int, folder: Path) -> Iterator[Case]:
    """Empty `waiting`, yielding each case that has got its outcome."""
    while waiting:
        suspects = yield from _spooled_until_crash(waiting, work, workers)
        for suspect in suspects:
            if (yield from _spooled_until_crash(deque([suspect]), work, 1)):
                death = "the process that read it died (out of memory, or a fault in its decoder)"
                error = _refused(suspect, death, "build where there is more memory, or leave it out")
                _publish_outcome(folder, suspect.name, Quarantined.of(suspect.name, error))
                yield suspect


def _spooled_until_crash(
    waiting: deque[Case], work: Callable[[Case], None], workers: int
) -> Generator[Case, None, list[Case]]:
    """Empty `waiting` through a pool; returns the cases in hand when one of its processes died, else []."""
    in_hand: dict[Future[None], Case] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            while waiting or in_hand:
                while waiting and len(in_hand) < workers:
                    in_hand[pool.submit(work, waiting[0])] = waiting[0]
                    waiting.popleft()
                for future in wait(in_hand, return_when=FIRST_COMPLETED).done:
                    future.result()
                    yield in_hand.pop(future)
        except BrokenProcessPool:
            return list(in_hand.values())
    return []


def _end_with_parent() -> None:
    """Without this a worker whose build was killed would wait for more work for ever."""

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _publish_outcome(folder: Path, case_name: str, outcome: Outcome) -> None:
    with publish(_outcome_path(folder, case_name)) as file:
        file.write(_OUTCOME.dump_json(outcome))


def _read_outcome(folder: Path, case_name: str) -> Outcome | None:
    try:
        return _OUTCOME.validate_json(_outcome_path(folder, case_name).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _outcome_path(folder: Path, case_name: str) -> Path:
    return folder / f"{case_name}.outcome.json"


def _refused(case: Case, what: str, cure: str) -> CaseError:
    return CaseError(what, where=case.files[0], cure=cure)
