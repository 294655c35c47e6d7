"""What a source yields: cases that can be read, and problems that say why others cannot."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mixcl_dist.data_shards.volume import CaseError

Split = Literal["training", "validation", "unlabelled"]
ClassValues = tuple[tuple[int, str], ...]
"""Value in a label file → class name; 0 is background."""
NIFTI_ENDINGS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Case:
    """One CT on disk and what is known of it; nothing has been read but names and headers."""

    name: str
    """[A-Za-z0-9_-]+, unique in its source; for DICOM a pseudonym."""
    dataset: str
    split: Split
    format: Literal["nifti", "dicom"]
    files: tuple[Path, ...]
    """One NIfTI file, or the slices of a DICOM series in slice order."""
    label: Path | None = None
    """NIfTI file on the image's grid."""
    label_values: ClassValues = ()
    annotated: tuple[str, ...] = ()
    """Classes that were looked for in this case; any other is unknown rather than absent."""
    doubtful: tuple[str, ...] = ()
    """Annotated classes whose contour is known to be wrong."""

    @property
    def reliable(self) -> tuple[str, ...]:
        """The annotated classes that may be learnt from and scored."""
        return tuple(name for name in self.annotated if name not in self.doubtful)


@dataclass(frozen=True)
class Source:
    """The cases of one data set; `problems` tell of what could not even become a case."""

    name: str
    cases: tuple[Case, ...]
    classes: tuple[str, ...]
    problems: tuple[CaseError, ...]


def nifti_stem(file: Path) -> str:
    """The file's name without `.nii` or `.nii.gz`."""
    return file.name.removesuffix(".gz").removesuffix(".nii")


def collect(
    name: str, root: Path, cases: Sequence[Case], problems: Sequence[CaseError], classes: Iterable[str] = ()
) -> Source:
    """A source of `cases`, each under a name of its own.

    Where several NIfTI files share a name, it is preceded by their folders below `root`. Dots become dashes,
    since in a shard a dot begins an extension. Each later case of a name that is still the same becomes a
    problem.
    """
    times = Counter(_sanitised(case.name) for case in cases)
    kept: dict[str, Case] = {}
    problems = list(problems)
    for case in cases:
        unique = _sanitised(case.name)
        if times[unique] > 1 and case.format == "nifti":
            unique = _sanitised(os.path.relpath(case.files[0].parent / case.name, root))
        if unique in kept:
            cure = "list each scan once, in one split, under names that differ in letters or digits"
            what = f"is named {unique} as is {kept[unique].files[0]}"
            problems.append(CaseError(what, where=case.files[0], cure=cure))
        else:
            kept[unique] = replace(case, name=unique)
    return Source(name, tuple(kept.values()), tuple(dict.fromkeys(classes)), tuple(problems))


def _sanitised(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "case"
