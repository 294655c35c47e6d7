"""One mask file for each class, as TotalSegmentator and AbdomenAtlas have them.

    s0001/ct.nii.gz, s0001/segmentations/liver.nii.gz, …                              beside each other
    image_only/BDMAP_00000001/ct.nii.gz, mask_only/BDMAP_00000001/segmentations/…      or apart

A class without a file is unknown in that case; one whose mask is empty was looked for and is absent. All labelled cases
are for training, unless a `splits.json` says otherwise. Case folders that are called as in those data sets keep their
names; any other may be named after a patient, so it gets a pseudonym.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from mixcl_dist.data_shards.sources.case import NIFTI_ENDINGS, Case, Source, Split, collect, file_stem
from mixcl_dist.data_shards.sources.pseudonym import pseudonym
from mixcl_dist.data_shards.volume import CaseError

IMAGE, MASKS = "ct.nii.gz", "segmentations"
APART = ("image_only", "mask_only")
PUBLIC_NAME = re.compile(r"s\d{4}|BDMAP_[A-Z]?\d+")


def is_masks(folder: Path) -> bool:
    """Whether cases lie in `folder` with their masks."""
    return next(folder.glob(f"*/{MASKS}/*.nii*"), None) is not None or all((folder / part).is_dir() for part in APART)


def open_masks(folder: Path) -> Source:
    """The cases of `folder`; raises `CaseError` when there are none."""
    images, masks = (folder / part if (folder / part).is_dir() else folder for part in APART)
    public = all(PUBLIC_NAME.fullmatch(image.parent.name) for image in images.glob(f"*/{IMAGE}"))
    dataset = folder.name if public else MASKS
    cases: list[Case] = []
    problems: list[CaseError] = []
    for image in sorted(images.glob(f"*/{IMAGE}")):
        called = image.parent.name
        found = sorted((masks / called / MASKS).glob("*"))
        files = tuple(file for file in found if file.name.endswith(NIFTI_ENDINGS) and not file.name.startswith("."))
        names = tuple(file_stem(file) for file in files)
        name = called if PUBLIC_NAME.fullmatch(called) else pseudonym(f"{folder.name}/{called}")
        split: Split = "training" if files else "unlabelled"
        values = tuple(enumerate(names, start=1))
        cases.append(Case(name, dataset, split, "nifti", (image,), files, values, names, label_format="masks"))
    for case in (part.parent for part in sorted(masks.glob(f"*/{MASKS}"))):
        if not (images / case.name / IMAGE).exists():
            problems.append(CaseError(f"has masks but no {IMAGE}", where=case, cure="restore it"))
    if not cases and not problems:
        raise CaseError(f"holds no */{IMAGE}", where=folder, cure="check the folder")
    classes = sorted({name for case in cases for name in case.annotated})
    source = collect(dataset, folder, cases, problems, classes)
    return replace(source, labels_from=f"put one mask for each class into CASE/{MASKS}")
