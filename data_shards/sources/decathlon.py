"""JSON that lists cases: `dataset.json` of the Medical Segmentation Decathlon and MONAI, and plain case
lists.

`dataset.json` names the classes once and lists cases under `training` and `validation`, each with `image`,
`label` and optionally `annotated` (the classes that were looked for in it; all of them without it) and
`doubtful` (those of them whose contour is wrong). Cases without a label, and those under `unlabelled`, are
unlabelled. `test` is withheld.

A case list is a JSON list of such entries, each with its own `labels`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixcl_dist.data_shards.catalogue import unknown_name
from mixcl_dist.data_shards.sources.case import (
    BACKGROUND,
    IGNORE,
    VOXEL_ENDINGS,
    Case,
    ClassValues,
    Source,
    Split,
    collect,
    file_stem,
)
from mixcl_dist.data_shards.sources.classes import FILE_NAME
from mixcl_dist.data_shards.sources.voxels import files_of, format_of
from mixcl_dist.data_shards.volume import CaseError

NOTHING = re.compile(
    r"\b(back ?ground|bg|clear|none|no|not|nothing|non|empty|others?|else|rest|void|air|outside|exterior|unlabell?ed|"
    r"unknown|normal|0)\b"
)
"""What value 0 is called where it stands for no organ."""
SPLITS: dict[str, Split] = {
    "training": "training",
    "validation": "validation",
    "unlabelled": "unlabelled",
    "unlabeled": "unlabelled",
}


def list_file(path: Path) -> Path | None:
    """The JSON file that lists the cases of a data set, None for a folder without one; raises `CaseError`."""
    if path.is_dir():
        return next((path / name for name in ("dataset.json", "cases.json") if (path / name).exists()), None)
    if path.exists() and path.suffix != ".json":
        raise CaseError("is no data set", where=path, cure="give a folder or a JSON file that lists cases")
    return path


def read_json(file: Path) -> Any:
    """The content of a JSON file; raises `CaseError`."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CaseError(f"cannot be read: {error.strerror}", where=file, cure="check path and permission") from None
    except ValueError as error:
        raise CaseError(f"not valid JSON: {error}", where=file, cure="correct it at that place") from None


def open_dataset(file: Path, content: Mapping[str, Any], unnamed: ClassValues) -> Source:
    """The cases of a Decathlon `dataset.json`; raises `CaseError` when it lists none or is not about CT.

    `unnamed` are the values of the label files where it names none.
    """
    refuse_other_modalities(file, content.get("modality"))
    values = class_values(content.get("labels", {}), file)
    entries = [(split, entry) for key, split in SPLITS.items() for entry in content.get(key) or ()]
    if not entries:
        cure = "list cases under 'training', 'validation' or 'unlabelled'"
        raise CaseError("lists no cases", where=file, cure=cure)
    name = file.parent.name if file.name == "dataset.json" else file.stem
    return _listed(file, name, entries, values, unnamed)


def open_case_list(file: Path, entries: list[Any], unnamed: ClassValues) -> Source:
    """The cases of a JSON list; all of them are for training. Raises `CaseError` when there are none.

    `unnamed` are the values of the label file of an entry that names none.
    """
    if not entries:
        raise CaseError("lists no cases", where=file, cure="add entries with 'image', 'label' and 'labels'")
    name = file.parent.name if file.name == "cases.json" else file.stem
    return _listed(file, name, [("training", entry) for entry in entries], None, unnamed)


def class_values(labels: Any, where: Path) -> ClassValues:
    """Value in the label file → class, from {"1": "liver"} or nnU-Net's {"liver": 1}; 0 is background.

    A class "ignore" is what nnU-Net means by it: voxels of unknown class. Raises `CaseError`.
    """
    pairs: dict[int, str] = {}
    for key, value in labels.items() if isinstance(labels, Mapping) else ():
        number, name = (value, key) if isinstance(value, int | float | list) else (key, value)
        number = int(number) if isinstance(number, float) and number.is_integer() else number
        if isinstance(number, list):
            cure = "give each class one value, without nnU-Net's regions"
            raise CaseError(f"class {name!r} is a region of several values", where=where, cure=cure)
        if not isinstance(name, str) or not name.strip() or not str(number).isdecimal():
            cure = 'write {"1": "liver"} or {"liver": 1}'
            raise CaseError(f"labels hold {key!r}: {value!r}", where=where, cure=cure)
        number = int(number)
        if number == 0 and name != IGNORE and not NOTHING.search(re.sub("[_-]", " ", name.casefold())):
            cure = f"give {name!r} another value in the label files, or call it background"
            raise CaseError(f"value 0, which is background, is named {name!r}", where=where, cure=cure)
        if pairs.setdefault(number, name) != name:
            cure = "give each value one name"
            raise CaseError(f"value {number} is named {pairs[number]!r} and {name!r}", where=where, cure=cure)
    return tuple(sorted((number, name) for number, name in pairs.items() if number > 0 or name == IGNORE))


def class_names(values: ClassValues) -> tuple[str, ...]:
    """Every class of `values` once."""
    return tuple(dict.fromkeys(name for _, name in values if name not in (BACKGROUND, IGNORE)))


def refuse_other_modalities(file: Path, modality: Any) -> None:
    """Raise `CaseError` unless a data set's `modality` or `channel_names` is one CT, or says nothing."""
    names = list(modality.values()) if isinstance(modality, Mapping) else [modality or "CT"]
    if len(names) > 1 or not all("CT" in str(name).upper() for name in names):
        shown = ", ".join(map(str, names))
        raise CaseError(f"modality is {shown}, not one CT", where=file, cure="give CT alone, called so")


def _listed(
    file: Path, name: str, entries: list[tuple[Split, Any]], values: ClassValues | None, unnamed: ClassValues
) -> Source:
    cases, problems = [], []
    for split, entry in entries:
        try:
            cases.append(_case(file, name, split, entry, values, unnamed))
        except CaseError as problem:
            problems.append(problem)
    classes = [class_name for case in cases for _, class_name in case.label_values]
    source = collect(name, file.parent, cases, problems, [c for _, c in values or ()] + classes)
    return replace(source, labels_from="give entries under 'training' a 'label'")


def _case(file: Path, dataset: str, split: Split, entry: Any, values: ClassValues | None, unnamed: ClassValues) -> Case:
    """One entry as a case; `values` are the data set's classes, or None where the entry has its own."""
    entry = {"image": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or not isinstance(entry.get("image"), str):
        cure = "name one file of voxels as its 'image'"
        raise CaseError(f"{split} entry {json.dumps(entry)[:80]} has no single image", where=file, cure=cure)
    image = _existing(file, entry, "image")
    scan = Case(file_stem(image), dataset, "unlabelled", format_of(image), files_of(image))
    if split == "unlabelled" or not entry.get("label"):
        if split == "validation":
            cure = "give it a label, or move it to 'unlabelled'"
            raise CaseError(f"validation case {entry['image']} has no label", where=file, cure=cure)
        return scan
    values = (class_values(entry.get("labels"), file) if values is None else values) or unnamed
    if not values:
        cure = f'name its classes under \'labels\', as in {{"1": "liver"}}, or in {FILE_NAME}'
        raise CaseError(f"label of case {entry['image']} has no class names", where=file, cure=cure)
    classes = class_names(values)
    annotated = tuple(entry.get("annotated", classes))
    doubtful = tuple(entry.get("doubtful", ()))
    for name in annotated + doubtful:
        if name not in classes:
            cure = "name it under 'labels' or correct it"
            raise CaseError(f"{entry['image']}: {unknown_name('class', name, classes)}", where=file, cure=cure)
    labels = files_of(_existing(file, entry, "label"))
    return replace(scan, split=split, labels=labels, label_values=values, annotated=annotated, doubtful=doubtful)


def _existing(file: Path, entry: Mapping[str, Any], key: str) -> Path:
    path = file.parent / str(entry[key])
    if not path.is_file():
        cure = "restore the file or remove the entry"
        raise CaseError(f"{key} of case {entry['image']} is missing: {path}", where=file, cure=cure)
    if not path.name.lower().endswith(VOXEL_ENDINGS):
        cure = "convert it to .nii.gz, .nrrd or .mha"
        raise CaseError(f"{key} of case {entry['image']} cannot be read by its name: {path}", where=file, cure=cure)
    return path
