"""nnU-Net's raw data folders: `imagesTr/CASE_0000.nii.gz`, `labelsTr/CASE.nii.gz`, and `imagesUn` without
labels.

`imagesTs` is withheld. Cases that a list `validation` in `dataset.json` names are for that; see `splits`, too. Files
of nnU-Net's first version, whose `dataset.json` lists cases without the `_0000` of their images, are read alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixcl_dist.data_shards.sources.case import VOXEL_ENDINGS, Case, ClassValues, Source, Split, collect
from mixcl_dist.data_shards.sources.decathlon import class_names, class_values, refuse_other_modalities
from mixcl_dist.data_shards.sources.voxels import files_of, format_of
from mixcl_dist.data_shards.volume import CaseError

CHANNEL = "_0000"


def is_nnunet(folder: Path, content: Mapping[str, Any]) -> bool:
    """Whether `dataset.json`, a name that nnU-Net shares with Decathlon, is nnU-Net's."""
    if "channel_names" in content:
        return True
    listed = [entry.get("image") for entry in content.get("training") or () if isinstance(entry, Mapping)]
    image = next((folder / image for image in listed if isinstance(image, str)), None)
    return image is not None and not image.exists() and any(folder.glob(f"imagesTr/*{CHANNEL}.nii*"))


def open_nnunet(folder: Path, content: Mapping[str, Any]) -> Source:
    """The cases of an nnU-Net folder; raises `CaseError` when it is not of one CT channel or has no cases."""
    where = folder / "dataset.json"
    refuse_other_modalities(where, content.get("channel_names", content.get("modality")))
    ending = content.get("file_ending", ".nii.gz")
    if ending not in VOXEL_ENDINGS:
        raise CaseError(f"file ending {ending} cannot be read", where=where, cure="convert the files to .nii.gz")
    values = class_values(content.get("labels"), where)
    held_out = _listed(content.get("validation"), ending)
    cases, problems = [], []
    for image in sorted(file for part in ("imagesTr", "imagesUn") for file in folder.glob(f"{part}/*{ending}")):
        stem = image.name.removesuffix(ending)
        label = folder / "labelsTr" / f"{stem.removesuffix(CHANNEL)}{ending}"
        if not stem.endswith(CHANNEL):
            cure = f"name the one CT of each case CASE{CHANNEL}{ending} and remove other channels"
            problems.append(CaseError(f"is not channel {CHANNEL}", where=image, cure=cure))
        elif image.parent.name == "imagesTr" and not label.is_file():
            cure = "restore it, or move the image to imagesUn"
            problems.append(CaseError(f"label {label} is missing", where=image, cure=cure))
        else:
            try:
                name = stem.removesuffix(CHANNEL)
                split: Split = "validation" if name in held_out else "training"
                cases.append(_case(name, folder.name, image, label, values, split))
            except CaseError as problem:
                problems.append(problem)
    if not cases and not problems:
        raise CaseError(f"no files *{CHANNEL}{ending} in imagesTr or imagesUn", where=folder, cure="check the folder")
    source = collect(folder.name, folder, cases, problems, class_names(values))
    return replace(source, labels_from="put the images into imagesTr and labels, called as they are, into labelsTr")


def _listed(entries: Any, ending: str) -> set[str]:
    """The cases that a list in `dataset.json` names, by image file or by name."""
    images = [entry.get("image") if isinstance(entry, Mapping) else entry for entry in entries or ()]
    return {Path(str(image)).name.removesuffix(ending).removesuffix(CHANNEL) for image in images}


def _case(name: str, dataset: str, image: Path, label: Path, values: ClassValues, split: Split) -> Case:
    if image.parent.name == "imagesUn":
        return Case(name, dataset, "unlabelled", format_of(image), files_of(image))
    classes = class_names(values)
    return Case(name, dataset, split, format_of(image), files_of(image), files_of(label), values, classes)
