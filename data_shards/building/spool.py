"""Stage 1 of a build: each case → its patches on this machine's disk, and a record of what became of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from pydantic import TypeAdapter, ValidationError

from mixcl_dist.data_shards.building.face import shows_face
from mixcl_dist.data_shards.building.patches import cut, pad_to, patch_origins
from mixcl_dist.data_shards.building.processes import Mapper
from mixcl_dist.data_shards.building.settings import BuildConfig, Progress
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.format.codec import CT_MEMBERS, SEG_MEMBER, digest, encode
from mixcl_dist.data_shards.format.fingerprint import fingerprint, voxel_digest
from mixcl_dist.data_shards.format.manifest import HU_BINS, CaseRecord, sample_key
from mixcl_dist.data_shards.format.shard import write_shard
from mixcl_dist.data_shards.sources import Case, Source, read_case
from mixcl_dist.data_shards.storage.publishing import publish
from mixcl_dist.data_shards.volume import AIR_HU, CaseError, Volume, crop_to_body, hu_counts, resample, shown

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
    stamp: str = ""
    """Of the case when it was tried (see `stamp_of`): as long as it stays, the case is not tried again."""

    @classmethod
    def of(cls, case: str | None, error: CaseError, stamp: str = "") -> Quarantined:
        return cls(case, shown(error.where), error.what, error.cure, stamp)

    @property
    def error(self) -> CaseError:
        return CaseError(self.message, where=Path(self.file), cure=self.cure)


@dataclass(frozen=True)
class Spooled:
    """A case whose patches lie ready in its own shard."""

    record: CaseRecord
    hu_histogram: tuple[int, ...]
    present: tuple[tuple[int, ...], ...]
    """Labels in each patch; none where the case has no label."""
    fingerprint: str
    """In hexadecimal digits."""
    stamp: str


Outcome = Spooled | Quarantined
_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Outcome)


def choose_cases(opened: Sequence[Source], splits: Sequence[str]) -> tuple[list[Case], list[Quarantined]]:
    """The cases of the wanted splits, and what their sources or their names forbid."""
    refused = [Quarantined.of(None, problem) for source in opened for problem in source.problems + source.strays]
    chosen: dict[str, Case] = {}
    for case in (case for source in opened for case in source.cases if case.split in splits):
        if len(case.name) > MAX_NAME:
            error = refusal(case, f"case name {case.name} is longer than {MAX_NAME} characters", "rename it")
        elif case.name in chosen:
            cure = "rename the folder of one of the two data sets, or give it once"
            cure = "it is the same series: leave one of the two places out" if case.format == "dicom" else cure
            error = refusal(case, f"case name {case.name} is taken by {chosen[case.name].files[0]}", cure)
        else:
            chosen[case.name] = case
            continue
        refused.append(Quarantined.of(case.name, error))
    return list(chosen.values()), refused


def stamp_of(case: Case, catalogue: Catalogue) -> str:
    """A digest of all that the patches of `case` follow from, beside the build's settings.

    Files count as unchanged while their size and time are the same.
    """
    files = [[path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None for path in case.inputs]
    numbers = [catalogue.classes.index(name) + 1 for name in case.annotated if name in catalogue.classes]
    described = json.dumps([dataclasses.asdict(case), files, numbers], default=str, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(described.encode())


def spool_cases(
    stamped: Mapping[str, tuple[Case, str]],
    catalogue: Catalogue,
    config: BuildConfig,
    folder: Path,
    run: Mapper,
    progress: Progress,
) -> dict[str, Outcome]:
    """The outcomes of cases, given with their stamps by name; those that have none of this stamp yet are spooled.

    A case that kills its process is quarantined without a stamp, so that the next build tries it again. Raises
    `OSError` when `folder` cannot be written.
    """
    outcomes = {name: _read_outcome(folder, name, stamp) for name, (_, stamp) in stamped.items()}
    waiting = [stamped[name] for name, outcome in outcomes.items() if outcome is None]
    done = len(stamped) - len(waiting)
    work = partial(spool_case, catalogue=catalogue, config=config, folder=folder)
    for (case, stamp), _, death in run(work, waiting):
        if death:
            error = refusal(case, f"the process that read it died ({death})", "build where there is more memory")
            outcomes[case.name] = Quarantined.of(case.name, error)
        else:
            outcomes[case.name] = _read_outcome(folder, case.name, stamp)
        done += 1
        progress(done, len(stamped), "case")
    return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


def write_quarantine(out: Path, refused: Sequence[Quarantined]) -> None:
    with publish(_quarantine(out)) as file:
        file.writelines(json.dumps(dataclasses.asdict(entry)).encode() + b"\n" for entry in refused)


def read_quarantine(out: Path) -> list[Quarantined]:
    """What earlier builds in `out` could not use."""
    path = _quarantine(out)
    return [Quarantined(**json.loads(line)) for line in path.read_bytes().splitlines()] if path.exists() else []


def _quarantine(out: Path) -> Path:
    return out / ".build" / "quarantine.jsonl"


def shard_of(folder: Path, case_name: str) -> Path:
    """The case's own shard, from which stage 2 draws."""
    return folder / f"{case_name}.tar"


def spool_case(stamped: tuple[Case, str], catalogue: Catalogue, config: BuildConfig, folder: Path) -> None:
    """Read, crop and cut a case, write its patches to `folder`, and publish the outcome last.

    Whatever is wrong with the case becomes its outcome. Only a failure to write raises, as `OSError`.
    """
    case, stamp = stamped
    samples: list[tuple[str, dict[str, bytes]]] = []
    outcome: Outcome
    try:
        volume = read_case(case, catalogue)
        record = CaseRecord(
            name=case.name,
            dataset=case.dataset,
            split=case.split,
            reliable=case.reliable,
            labelled=volume.label is not None,
            patches=0,
            spacing_mm=volume.spacing,
            source_digest=voxel_digest(volume.hu),
            label_digest=None if volume.label is None else voxel_digest(volume.label),
            shows_face=shows_face(volume),
        )
        marks = fingerprint(volume).tobytes().hex()
        if config.spacing_mm is not None:
            volume = resample(volume, config.spacing_mm)
        body = crop_to_body(volume, config.body_margin_mm)
        patches = cut_patches(body, config)
        samples = [
            (sample_key(case.name, number), _sample(record, volume, patch, config))
            for number, patch in enumerate(patches)
        ]
        if not samples:
            raise refusal(case, "every patch is almost only air", "lower build.min_body_fraction, or leave it out")
        record = dataclasses.replace(record, patches=len(samples), spacing_mm=volume.spacing)
        present = tuple(() if patch.label is None else tuple(np.unique(patch.label).tolist()) for patch in patches)
        outcome = Spooled(record, _hu_histogram(body.hu), present, marks, stamp)
    except CaseError as error:
        outcome = Quarantined.of(case.name, error, stamp)
    except Exception as error:  # one unreadable file of a million must not end the build
        refused = refusal(case, f"{type(error).__name__}: {error}", "see whether another program opens it")
        outcome = Quarantined.of(case.name, refused, stamp)
    if isinstance(outcome, Spooled):
        write_shard(shard_of(folder, case.name), samples)
    _publish_outcome(folder, case.name, outcome)


def cut_patches(body: Volume, config: BuildConfig) -> list[Volume]:
    """The patches of a volume, in order."""
    origins = patch_origins(body, config.patch_size, config.overlap, config.min_body_fraction)
    padded = pad_to(body, config.patch_size)
    return [cut(padded, origin, config.patch_size) for origin in origins]


def quantised(hu: np.ndarray, step: int) -> np.ndarray:
    """The nearest of every `step`-th HU, counted from air (-1024), so that air and padding stay exact; 0 is lossless.

    No value moves by more than step / 2.
    """
    if step == 0:
        return hu
    above_air = hu.astype(np.int32) - AIR_HU
    nearest = (above_air + step // 2) // step * step + AIR_HU
    return np.minimum(nearest, np.iinfo(np.int16).max).astype(np.int16)


def _sample(record: CaseRecord, volume: Volume, patch: Volume, config: BuildConfig) -> dict[str, bytes]:
    """The members of `patch`, which was cut from `volume`."""
    arrays = {CT_MEMBERS[config.codec]: quantised(patch.hu, config.quantise_hu)}
    if patch.label is not None:
        arrays[SEG_MEMBER] = patch.label
    payloads = {member: encode(member, array) for member, array in arrays.items()}
    description = {
        "case": record.name,
        "dataset": record.dataset,
        "split": record.split,
        "annotated": record.reliable,
        "shape": patch.hu.shape,
        "dtype": {member: array.dtype.name for member, array in arrays.items()},
        "quantise_hu": config.quantise_hu,
        "spacing_mm": patch.spacing,
        "affine": patch.affine.tolist(),
        "offset_voxels": [round(index) for index in (np.linalg.inv(volume.affine) @ patch.affine)[:3, 3]],
        "source_digest": record.source_digest,
        "xxh3": {member: digest(payload) for member, payload in payloads.items()},
    }
    return {**payloads, "json": json.dumps(description).encode()}


def _hu_histogram(hu: np.ndarray) -> tuple[int, ...]:
    first, last, bins = HU_BINS
    places = (np.clip(np.arange(-(1 << 15), 1 << 15), first, last - 1) - first) // ((last - first) // bins)
    return tuple(np.bincount(places, weights=hu_counts(hu), minlength=bins).astype(np.int64).tolist())


def _read_outcome(folder: Path, case_name: str, stamp: str) -> Outcome | None:
    try:
        outcome = _OUTCOME.validate_json(_outcome_path(folder, case_name).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return outcome if outcome.stamp == stamp else None


def _publish_outcome(folder: Path, case_name: str, outcome: Outcome) -> None:
    with publish(_outcome_path(folder, case_name)) as file:
        file.write(_OUTCOME.dump_json(outcome))


def _outcome_path(folder: Path, case_name: str) -> Path:
    return folder / f"{case_name}.outcome.json"


def refusal(case: Case, what: str, cure: str) -> CaseError:
    return CaseError(what, where=case.files[0], cure=cure)
