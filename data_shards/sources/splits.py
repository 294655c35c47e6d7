"""`splits.json`, which says of the cases of any source which are trained on and which are scored.

    {"training": ["case_1", "case_2"], "validation": ["imagesTr/case_3_0000.nii.gz", "patient_7"]}

It lies in the folder, or beside the list, and names a case by its name or by the path from there of its image or of a
folder around it. Without `training`, every labelled case outside `validation` is trained on; with it, a labelled case
in neither list is left out. Unlabelled cases stay unlabelled.

nnU-Net's `splits_final.json` is read where there is no `splits.json` and nothing else names a validation case: of its
folds the first, fold 0. For another fold, write its lists into a `splits.json`.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixcl_dist.data_shards.catalogue import sanitised, unknown_name
from mixcl_dist.data_shards.sources.case import Case, Source
from mixcl_dist.data_shards.sources.decathlon import read_json
from mixcl_dist.data_shards.volume import CaseError

logger = logging.getLogger(__name__)

FILE_NAME, NNUNET_FILE_NAME = "splits.json", "splits_final.json"
KEYS = {"training": ("training", "train"), "validation": ("validation", "val")}
"""The list of a split as this project and as nnU-Net call it."""


def with_splits(source: Source, folder: Path) -> Source:
    """`source`, whose list or scans lie in `folder`, with the splits that a file there gives its cases.

    Raises `CaseError` for a file that cannot be used, or that names what is no case here, unless the source's problems
    may be the reason.
    """
    file = folder / FILE_NAME
    if not file.exists():
        file = folder / NNUNET_FILE_NAME
        if not file.exists() or any(case.split == "validation" for case in source.cases):
            return source
    training, validation = _read(file)
    trained, unknown = _found(source.cases, folder, training or ())
    scored, unknown_too = _found(source.cases, folder, validation)
    unknown += unknown_too
    problems = [_unknown(unknown, source.cases, folder, file)] if unknown else []
    if problems and not source.problems:
        raise problems[0]
    if both := trained & scored:
        raise CaseError(f"has {min(both)} in both lists", where=file, cure="leave it in one of them")
    if training is None:
        trained = {case.name for case in source.cases} - scored
    unlabelled = sorted(case.name for case in source.cases if case.name in scored and not case.labels)
    problems += [_unlabelled(name, file) for name in unlabelled]
    cases = [_in_split(case, trained, scored) for case in source.cases if case.name not in unlabelled]
    kept = tuple(case for case in cases if case is not None)
    if left := len(cases) - len(kept):
        logger.warning("%s: %d labelled cases are in neither list and left out", file, left)
    return replace(source, cases=kept, problems=(*source.problems, *problems))


def how_to_split(cases: Sequence[Case], folder: Path) -> str:
    """What to write, and where, so that a source in `folder` with these labelled `cases` has a validation split."""
    example = json.dumps({"validation": [_paths(cases[-1], folder)[0]]})
    return f"write {folder / FILE_NAME}, e.g. {example}, cases by name or path"


def _read(file: Path) -> tuple[list[str] | None, list[str]]:
    """The entries for training, None where all others are meant, and for validation; raises `CaseError`."""
    content = read_json(file)
    if isinstance(content, list):  # folds
        content = content[0] if content else None
    shape = 'write {"training": ["CASE", …], "validation": ["CASE", …]}'
    if not isinstance(content, Mapping):
        raise CaseError("holds no lists of cases", where=file, cure=shape)
    known = [key for keys in KEYS.values() for key in keys]
    if wrong := [str(key) for key in content if key not in known]:
        raise CaseError(unknown_name("list", wrong[0], known), where=file, cure=shape)
    training, validation = (_entries(content, keys, file, shape) for keys in KEYS.values())
    if not validation:
        raise CaseError("lists no validation cases", where=file, cure=shape)
    return training, validation


def _entries(content: Mapping[str, Any], keys: Sequence[str], file: Path, shape: str) -> list[str] | None:
    listed = next((content[key] for key in keys if key in content), None)
    if listed is None:
        return None
    entries = []
    for entry in listed if isinstance(listed, list) else [listed]:
        named = entry.get("image") if isinstance(entry, Mapping) else entry
        if not isinstance(named, str) or not named:
            raise CaseError(f"{keys[0]} holds {json.dumps(entry)[:80]}, which names no case", where=file, cure=shape)
        entries.append(named)
    return entries


def _found(cases: Sequence[Case], folder: Path, entries: Sequence[str]) -> tuple[set[str], list[str]]:
    """Names of the cases that `entries` name, and those of them that name none."""
    by_name = {case.name for case in cases}
    by_path: defaultdict[str, set[str]] = defaultdict(set)
    for case in cases:
        for path in _paths(case, folder):
            by_path[path].add(case.name)
    names: set[str] = set()
    unknown = []
    for entry in entries:
        found = {entry, sanitised(entry)} & by_name or by_path.get(os.path.relpath(folder / entry, folder), set())
        names |= found
        unknown += [] if found else [entry]
    return names, unknown


def _unknown(entries: Sequence[str], cases: Sequence[Case], folder: Path, file: Path) -> CaseError:
    called = [name for case in cases for name in (case.name, _paths(case, folder)[0])]
    more = f" (and {len(entries) - 1} more)" if len(entries) > 1 else ""
    cure = f"name cases as in {called[0]} or {called[1]}" if called else "give a folder that holds cases"
    return CaseError(unknown_name("case", entries[0], called) + more, where=file, cure=cure)


def _paths(case: Case, folder: Path) -> list[str]:
    """What a case may be called beside its name, from `folder`: the folders around it but that one, and its files."""
    files = [os.path.relpath(file, folder) for file in case.files]
    around = {str(parent) for file in files for parent in Path(file).parents} - {"."}
    ordered = sorted(around, key=len, reverse=True)
    return [*ordered, *files] if case.format == "dicom" else [*files, *ordered]


def _in_split(case: Case, trained: Collection[str], scored: Collection[str]) -> Case | None:
    """The case with its split, None where it is left out."""
    if not case.labels:
        return case
    if case.name in scored:
        return replace(case, split="validation")
    return replace(case, split="training") if case.name in trained else None


def _unlabelled(name: str, file: Path) -> CaseError:
    return CaseError(f"validation case {name} has no label", where=file, cure="give it one, or take it from the list")
