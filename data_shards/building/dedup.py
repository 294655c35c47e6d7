"""Scans that come twice, as copies or made from one another, so that no test case leaks into pre-training."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixcl_dist.data_shards.building.processes import Mapper
from mixcl_dist.data_shards.building.settings import Progress
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.format.fingerprint import SIZE, fingerprint, near_pairs, voxel_digest
from mixcl_dist.data_shards.format.manifest import FILE_NAME, FINGERPRINTS_FILE, Manifest, ManifestError
from mixcl_dist.data_shards.format.shard import ANEW
from mixcl_dist.data_shards.sources import Case, open_images, open_source, read_case
from mixcl_dist.data_shards.volume import CaseError


class Scan(NamedTuple):
    """What tells a scan from others."""

    name: str
    origin: str
    """The source or folder of shards."""
    digest: str
    fingerprint: np.ndarray


@dataclass(frozen=True)
class Scans:
    found: list[Scan]
    problems: list[CaseError]
    """Of cases that could not be read, and so not be compared."""


class Match(NamedTuple):
    """Two scans that are one."""

    one: Scan
    other: Scan
    distance: float | None
    """Of their fingerprints; None for equal voxels."""

    def __str__(self) -> str:
        how = "the same voxels" if self.distance is None else f"distance {self.distance:.4f}"
        return f"{self.one.name} ({self.one.origin}) and {self.other.name} ({self.other.origin}): {how}"


def scans_of(paths: Sequence[Path], run: Mapper, progress: Progress, *, whole: Collection[Path] = ()) -> Scans:
    """The scans of sources, which are read, and of shards, which know them.

    Of sources in `whole` they are all images, those to test on among them; of others the cases that a build may use.
    Raises `CaseError` or `ManifestError` for what cannot be opened at all.
    """
    found: list[Scan] = []
    problems: list[CaseError] = []
    cases: list[tuple[Case, str]] = []
    for path in map(Path, paths):
        if (path / FILE_NAME).exists():
            found += scans_of_shards(path)
        else:
            source = (open_images if path in whole else open_source)(path)
            problems += source.problems
            cases += [(case, str(path)) for case in source.cases]
    for done, (item, scan, death) in enumerate(run(read_scan, cases), 1):
        if scan is None:
            cure = "compare where there is more memory"
            problems.append(CaseError(f"the process that read it died ({death})", where=item[0].files[0], cure=cure))
        elif isinstance(scan, CaseError):
            problems.append(scan)
        else:
            found.append(scan)
        progress(done, len(cases), "scan")
    return Scans(sorted(found, key=lambda scan: (scan.origin, scan.name)), problems)


def matches(ones: Iterable[Scan], others: Iterable[Scan]) -> list[Match]:
    """Every pair of one and other that is one scan, the nearest first; a scan is not held against itself."""
    ones, others = list(ones), list(others)
    by_digest: dict[str, list[int]] = {}
    for j, other in enumerate(others):
        by_digest.setdefault(other.digest, []).append(j)
    equal = {(i, j): None for i, one in enumerate(ones) for j in by_digest.get(one.digest, ())}
    near = {(i, j): max(distance, 0.0) for i, j, distance in near_pairs(_stacked(ones), _stacked(others))}
    found = [Match(ones[i], others[j], distance) for (i, j), distance in (near | equal).items()]
    apart = (match for match in found if match.one[:2] != match.other[:2])
    return sorted(apart, key=lambda match: (match.distance or 0.0, match.one.name, match.other.name))


def pairs_within(scans: Sequence[Scan], others: Sequence[Scan] = ()) -> list[Match]:
    """Every pair of `scans`, and of one of them and one of `others`, that is one scan, once; the nearest first."""
    found = {frozenset((match.one[:2], match.other[:2])): match for match in matches(scans, [*scans, *others])}
    return list(found.values())


def _stacked(scans: Sequence[Scan]) -> np.ndarray:
    return np.array([scan.fingerprint for scan in scans], dtype=np.int8).reshape(-1, SIZE)


def scans_of_shards(shards: Path | str) -> list[Scan]:
    """The scans in a folder or URL of shards, in the order of its cases; raises `ManifestError`."""
    manifest = Manifest.load(shards)
    marks = manifest.read_table(shards, FINGERPRINTS_FILE)
    if marks.shape[1] != SIZE:
        raise ManifestError(f"{shards}/{FINGERPRINTS_FILE}: has fingerprints of another version; {ANEW}")
    records = zip(manifest.cases, marks, strict=True)
    return [Scan(case.name, str(shards), case.source_digest, mark) for case, mark in records]


def read_scan(item: tuple[Case, str]) -> Scan | CaseError:
    """The scan of a case, and of what origin it is said to be, or why it cannot be read."""
    case, origin = item
    try:
        volume = read_case(dataclasses.replace(case, labels=()), Catalogue(()))
    except CaseError as error:
        return error
    except Exception as error:  # one unreadable file must not hide the others
        what = f"{type(error).__name__}: {error}"
        return CaseError(what, where=case.files[0], cure="see whether another program opens it")
    return Scan(case.name, origin, voxel_digest(volume.hu), fingerprint(volume))
