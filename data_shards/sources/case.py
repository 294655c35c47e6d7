"""What a source yields: cases that can be read, and problems that say why others cannot."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mixcl_dist.data_shards.catalogue import sanitised
from mixcl_dist.data_shards.volume import CaseError

Split = Literal["training", "validation", "unlabelled"]
LabelFormat = Literal["voxels", "masks", "rtstruct", "seg"]
ClassValues = tuple[tuple[int, str], ...]
"""Number of a structure in a label → its class, or one of the two names below."""
BACKGROUND = "background"
"""Belongs to no class; in a label file 0 does so unnamed."""
IGNORE = "ignore"
"""May belong to any class."""
NIFTI_ENDINGS = (".nii.gz", ".nii", ".hdr.gz", ".hdr")
ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
VOXEL_ENDINGS = NIFTI_ENDINGS + ITK_ENDINGS
"""In lower case; names are compared without regard to it."""


@dataclass(frozen=True)
class Case:
    """One CT on disk and what is known of it; nothing has been read but names and headers."""

    name: str
    """[A-Za-z0-9_-]+, unique in its source; a pseudonym where nobody has chosen it for being passed on."""
    dataset: str
    split: Split
    format: Literal["nifti", "itk", "dicom"]
    files: tuple[Path, ...]
    """One file of voxels, behind it that of its data where its header lies apart, or the slices of a DICOM series in
    slice order."""
    labels: tuple[Path, ...] = ()
    """One file of voxels like `files`, one mask for each entry of `label_values`, or one RTSTRUCT or SEG."""
    label_values: ClassValues = ()
    """By value, position in `labels` counted from 1, ROI number or segment number."""
    annotated: tuple[str, ...] = ()
    """Classes that were looked for in this case; any other is unknown rather than absent."""
    doubtful: tuple[str, ...] = ()
    """Annotated classes whose contour is known to be wrong."""
    label_format: LabelFormat = "voxels"

    @property
    def reliable(self) -> tuple[str, ...]:
        """The annotated classes that may be learnt from and scored."""
        return tuple(name for name in self.annotated if name not in self.doubtful)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Every file that its voxels and labels are read from."""
        return self.files + self.labels


@dataclass(frozen=True)
class Source:
    """The cases of one data set; `problems` tell of what could not even become a case."""

    name: str
    cases: tuple[Case, ...]
    classes: tuple[str, ...]
    problems: tuple[CaseError, ...]
    labels_from: str = ""
    """How cases of such a source get labels, as the cure where none has any."""
    unlisted: tuple[str, ...] = ()
    """Structures of RTSTRUCTs and SEGs that are in no class: their names where these may be told, else empty."""
    strays: tuple[CaseError, ...] = ()
    """What could be a scan and belongs to no case: a build names it, but no case suffers from it."""
    others: Mapping[Path, str] = field(default_factory=dict)
    """Every file of the source's folder that is no input of a case → what it is, in words."""


def file_stem(file: Path) -> str:
    """The name of a file of voxels without its ending."""
    ending = next((end for end in VOXEL_ENDINGS if file.name.lower().endswith(end)), file.suffix)
    return file.name[: len(file.name) - len(ending)]


def collect(
    name: str, root: Path, cases: Sequence[Case], problems: Sequence[CaseError], classes: Iterable[str] = ()
) -> Source:
    """A source of `cases`, each under a name of its own.

    Where several files of voxels share a name, it is preceded by their folders below `root`. Dots become dashes,
    since in a shard a dot begins an extension. Each later case of a name that is still the same becomes a
    problem.
    """
    times = Counter(sanitised(case.name) for case in cases)
    kept: dict[str, Case] = {}
    problems = list(problems)
    for case in cases:
        unique = sanitised(case.name)
        if times[unique] > 1 and case.format != "dicom":
            unique = sanitised(os.path.relpath(case.files[0].parent / case.name, root))
        if unique in kept:
            cure = "list each scan once, in one split, under names that differ in letters or digits"
            what = f"is named {unique} as is {kept[unique].files[0]}"
            problems.append(CaseError(what, where=case.files[0], cure=cure))
        else:
            kept[unique] = replace(case, name=unique)
    real = (one for one in classes if one not in (BACKGROUND, IGNORE))
    return Source(name, tuple(kept.values()), tuple(dict.fromkeys(real)), tuple(problems))
