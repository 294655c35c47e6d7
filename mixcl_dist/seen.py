"""Which scans a run has seen, known by their voxels, and the check that a trial's start kept to the trial's budget.

Names do not tell one scan from another: the same CT comes under other names, resampled, in other data sets.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixcl_dist.data_shards.building.dedup import Scan, matches, read_scan
from mixcl_dist.data_shards.building.spool import stamp_of
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.format.fingerprint import NEAR
from mixcl_dist.data_shards.sources import Case, CaseError
from mixcl_dist.errors import RunError
from mixcl_dist.jsonfiles import write_atomic
from mixcl_dist.progress import progress
from mixcl_dist.records import ANEW

FILE = "seen.npz"
"""In a run's folder."""
KNOWN_FILE = ".scans.npz"
"""In the folder of many runs."""
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
"""What reading a missing or damaged .npz may raise."""


@dataclass(frozen=True)
class Seen:
    """What a run has learnt from, it and the runs it started from."""

    scans: tuple[Scan, ...]
    labels: tuple[frozenset[str], ...]
    """Of each scan the classes whose labels were read."""

    def merged(self, other: Seen) -> Seen:
        """What either has seen; a scan of one name and digest is one."""
        scans: dict[tuple[str, str], Scan] = {}
        labels: defaultdict[tuple[str, str], frozenset[str]] = defaultdict(frozenset)
        for scan, classes in zip(self.scans + other.scans, self.labels + other.labels, strict=True):
            key = scan.name, scan.digest
            scans.setdefault(key, scan)
            labels[key] |= classes
        return Seen(tuple(scans.values()), tuple(labels[key] for key in scans))

    def save(self, run: Path) -> None:
        """Write `seen.npz`: names (N,), digests (N,), fingerprints (N, F) int8, classes (C,) and labels (N, C) bool."""
        classes = sorted(frozenset().union(*self.labels))
        read = [[name in of_scan for name in classes] for of_scan in self.labels]
        labels = np.array(read, dtype=bool).reshape(len(read), len(classes))
        write_atomic(run / FILE, _encoded(self.scans, classes=np.array(classes, dtype=str), labels=labels))

    @classmethod
    def load(cls, run: Path) -> Seen:
        """Raises `RunError` for a run that does not tell what it saw."""
        try:
            scans, arrays = _decoded((run / FILE).read_bytes(), str(run))
            classes = arrays["classes"].tolist()
            return cls(tuple(scans), tuple(frozenset(np.compress(row, classes).tolist()) for row in arrays["labels"]))
        except UNREADABLE:
            raise RunError(f"{run / FILE}: does not tell which scans the run has seen; {ANEW}") from None


class Shared(NamedTuple):
    """A case of a trial that its start has seen."""

    case: str
    scan: Scan
    """As the start knows it."""
    labels: frozenset[str]
    """Classes whose labels the start read of it."""
    distance: float | None
    """Of their fingerprints; None for equal voxels, which are one scan without a doubt."""

    @property
    def pair(self) -> tuple[str, str]:
        return self.case, self.scan.name


def shared_scans(seen: Seen, scans: Iterable[Scan]) -> list[Shared]:
    """Which of a trial's `scans` are among those seen, as copies or made from one another, under whatever name."""
    labels = {(scan.name, scan.digest): classes for scan, classes in zip(seen.scans, seen.labels, strict=True)}
    found = matches(scans, seen.scans)
    return [
        Shared(match.one.name, match.other, labels[match.other.name, match.other.digest], match.distance)
        for match in found
    ]


def one_patient(shared: Sequence[Shared], distinct: Collection[tuple[str, str]]) -> list[Shared]:
    """Those of `shared` that `distinct` (`budget.distinct_patients`) leaves; equal voxels always stay."""
    return [one for one in shared if one.distance is None or one.pair not in distinct]


def likeness(one: Shared, distinct: Collection[tuple[str, str]], where: str) -> tuple[str, str]:
    """How near a pair is, and what else than the cure may be done about it: nothing where the voxels are equal.

    `where` are the words behind `mixcl shards dedup` that list all such pairs.
    """
    if one.distance is None:
        return "the same voxels", ""
    pairs = shlex.quote(json.dumps([*map(list, distinct), list(one.pair)], ensure_ascii=False))
    return (
        f"distance {one.distance:.4f}, below {NEAR:g} is one scan",
        f"; or look at both, and at all such pairs by `mixcl shards dedup {where}`, and if they are two patients give "
        f"--budget.distinct_patients {pairs}",
    )


def told_apart(shared: Sequence[Shared]) -> str:
    """One line that names the pairs which count as two patients though they look like one scan."""
    pairs = ", ".join(f"{one.case} and {one.scan.name} ({one.distance or 0.0:.4f})" for one in shared)
    return f"look like one scan and count as two patients by budget.distinct_patients: {pairs}"


def leak(
    shared: Sequence[Shared],
    *,
    distinct: Collection[tuple[str, str]] = (),
    held_out: Mapping[str, str],
    budget: Mapping[str, Collection[str]],
    classes: Collection[str],
) -> str | None:
    """What a start has seen that a trial must not know: None, or one line that names a case and the cure.

    `held_out` are the cases whose images nothing may be learnt from, with their split, and `budget` the cases whose
    labels the trial uses, with the classes annotated there. Of the trial's scans only these labels may have been read
    of `classes`, those that it is to learn; labels of other classes are no leak, nor are those of other scans. Pairs in
    `distinct` are of two patients (see `one_patient`).
    """
    shared = sorted(one_patient(shared, distinct), key=lambda one: (one.distance is not None, one.pair))
    if held := [one for one in shared if one.case in held_out]:
        split = held_out[held[0].case]
        cures = {"validation": "build its shards with --exclude", "development": "train it with budget.development"}
        how, otherwise = likeness(held[0], distinct, "SHARDS --against DATA")
        return f"was trained on {split} case {_named(held, how)}; {cures[split]} of these cases{otherwise}"
    allowed: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for one in shared:
        allowed[one.scan.name, one.scan.digest].update(budget.get(one.case, ()))
    beyond = [(one, (one.labels & set(classes)) - allowed[one.scan.name, one.scan.digest]) for one in shared]
    if withheld := [(one, min(names)) for one, names in beyond if names]:
        how, otherwise = likeness(withheld[0][0], distinct, "SHARDS --against DATA")
        return (
            f"was trained with the labels of case {_named([one for one, _ in withheld], how)}, {withheld[0][1]} first, "
            f"outside the trial's budget of {len(budget)}; train it with the trial's --budget.scans or "
            f"--budget.fraction and its --budget.seed{otherwise}"
        )
    return None


def check_split(
    cases: Sequence[Case], label_cases: Collection[str], held_out: Mapping[str, str], known: KnownScans
) -> str | None:
    """Hold the labelled cases of a trial against those of its data set that are `held_out`, by voxels.

    Raises `CaseError` for one whose voxels are those of a held-out case under another name. Returns one line that warns
    of cases that look as if one was made from the other, or None.
    """
    chosen = [case for case in cases if case.name in label_cases or case.name in held_out]
    scans = {scan.name: scan for scan in known.of(chosen)}
    file = {case.name: case.files[0] for case in chosen}
    found = matches([scans[name] for name in label_cases], [scans[name] for name in held_out])
    for match in found:
        one, other = match.one.name, match.other.name
        if match.distance is None:
            what = f"training case {one} has the same voxels as {held_out[other]} case {other} ({file[other]})"
            raise CaseError(what, where=file[one], cure="leave one of them out, or put both into one split")
    if not found:
        return None
    one, other = found[0].one.name, found[0].other.name
    more = f" and {len(found) - 1} more such pairs" if len(found) > 1 else ""
    return (
        f"training case {one} looks like {held_out[other]} case {other} (distance {found[0].distance:.4f}){more}; if "
        "one was made from the other, leave one of them out, or put both into one split"
    )


def _named(shared: Sequence[Shared], how: str) -> str:
    first, *others = shared
    alias = "" if first.case == first.scan.name else f"there {first.scan.name}, "
    more = len({one.case for one in others} - {first.case})
    return f"{first.case} ({alias}{how})" + (f" and {more} more" if more else "")


class KnownScans:
    """Digests and fingerprints of cases on disk, kept in a file in the folder of many runs: each case is read once.

    A case is read again when one of its files has another size or time.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / KNOWN_FILE
        self._scans = self._read()
        self._added = False

    def of(self, cases: Sequence[Case]) -> list[Scan]:
        """The scans of `cases`, in their order; raises `CaseError` for one that cannot be read."""
        unlabelled = [dataclasses.replace(case, labels=()) for case in cases]
        stamps = [stamp_of(case, Catalogue(())) for case in unlabelled]
        new = [(stamp, case) for stamp, case in zip(stamps, unlabelled, strict=True) if stamp not in self._scans]
        for stamp, case in progress(new, total=len(new), desc="identify", unit="case") if new else ():
            scan = read_scan((case, "the trial's data"))
            if isinstance(scan, CaseError):
                raise scan
            self._scans[stamp] = scan
            self._added = True
        return [self._scans[stamp]._replace(name=case.name) for stamp, case in zip(stamps, cases, strict=True)]

    def save(self) -> None:
        """Add what was read to the file; the folder must be there."""
        if self._added:
            scans = self._read() | self._scans  # what runs beside this one have added
            write_atomic(self._path, _encoded(scans.values(), stamps=np.array(list(scans), dtype=str)))
            self._added = False

    def _read(self) -> dict[str, Scan]:
        try:
            scans, arrays = _decoded(self._path.read_bytes(), "the trial's data")
            return dict(zip(arrays["stamps"].tolist(), scans, strict=True))
        except UNREADABLE:
            return {}  # nothing is lost but time


def _encoded(scans: Iterable[Scan], **more: np.ndarray) -> bytes:
    scans, file = list(scans), io.BytesIO()
    arrays = {
        "names": np.array([scan.name for scan in scans], dtype=str),
        "digests": np.array([scan.digest for scan in scans], dtype=str),
        "fingerprints": np.array([scan.fingerprint for scan in scans], dtype=np.int8),
    }
    np.savez_compressed(file, allow_pickle=False, **arrays, **more)
    return file.getvalue()


def _decoded(content: bytes, origin: str) -> tuple[list[Scan], dict[str, Any]]:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = dict(file)
    columns = (arrays[key] for key in ("names", "digests", "fingerprints"))
    return [Scan(str(name), origin, str(digest), mark) for name, digest, mark in zip(*columns, strict=True)], arrays
