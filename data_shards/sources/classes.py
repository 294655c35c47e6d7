"""`classes.yaml`, which brings the structures of a source to the classes of the catalogue.

    liver: {source: 5}                              # a value of the label files
    kidney: {source: [kidney_left, kidney_right]}   # one class of several parts, by name
    lung: {source: [[Lung_L, Left Lung], [Lung_R, Right Lung]]}     # a part may be called one thing here, another there
    ignore: 255                                     # voxels of unknown class
    background: [7, 8]                              # values that have no name elsewhere and belong to no class

A source is a value, or the name of one in `dataset.json`, of a mask file, of a ROI or of a segment. A class is
annotated in the cases where all its parts are. Structures that are not listed belong to no class. Names are compared
without regard to case. ROIs and segments are known by name alone; their names, which people write freely, are used for
nothing else, and messages tell those alone that are made of anatomical terms.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mixcl_dist.data_shards.catalogue import unknown_name
from mixcl_dist.data_shards.sources.case import BACKGROUND, IGNORE, Case, ClassValues, Source
from mixcl_dist.data_shards.volume import CaseError

logger = logging.getLogger(__name__)

FILE_NAME = "classes.yaml"
MAX_SHOWN = 30
"""Structures in one message."""
Part = tuple[int | str, ...]
"""The values or names that one structure goes by; names in lower case."""


@dataclass(frozen=True)
class ClassMap:
    """The content of a `classes.yaml`."""

    file: Path
    parts: Mapping[str, tuple[Part, ...]]
    """Class, "ignore" or "background" → its parts."""

    def values(self) -> ClassValues:
        """A name for every value that is listed, for label files whose values have none."""
        listed = {key for parts in self.parts.values() for part in parts for key in part if isinstance(key, int)}
        return tuple((value, str(value)) for value in sorted(listed))

    def names(self) -> frozenset[str]:
        """All names that are listed, in lower case."""
        return frozenset(key for parts in self.parts.values() for part in parts for key in part if isinstance(key, str))


class _Loader(yaml.SafeLoader):
    """Refuses a key twice, of which YAML would keep the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.YAMLError(f"{twice[0]!r} stands there twice")
        return super().construct_mapping(node, deep)


def read_class_map(folder: Path) -> ClassMap | None:
    """The `classes.yaml` in `folder`, None where there is none; raises `CaseError`."""
    file = folder / FILE_NAME
    if not file.exists():
        return None
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise CaseError(f"cannot be read: {reason}", where=file, cure="check it and its permission") from None
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise CaseError(f"not valid YAML: {_place(error)}", where=file, cure="correct it at that place") from None
    if not isinstance(content, dict) or not content.keys() - {IGNORE, BACKGROUND}:
        raise CaseError("names no classes", where=file, cure="write lines as in `liver: {source: 5}`")
    parts = {}
    for name, entry in content.items():
        parts[name] = _parts(file, name, entry)
    listed = [key for part in parts.values() for keys in part for key in keys]
    twice = next((key for number, key in enumerate(listed) if key in listed[:number]), None)
    if twice is not None:
        raise CaseError(f"{twice!r} stands there twice", where=file, cure="give it to one class")
    return ClassMap(file, parts)


def _place(error: Exception) -> str:
    """What is wrong and where, without the parser's excerpt of the file."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error) or type(error).__name__
    return what if mark is None else f"{what}, in line {mark.line + 1} at column {mark.column + 1}"


def _parts(file: Path, name: Any, entry: Any) -> tuple[Part, ...]:
    def refuse(what: str) -> CaseError:
        return CaseError(what, where=file, cure="write lines as in `liver: {source: 5}`, see the README")

    if not isinstance(name, str):
        raise refuse(f"{name!r} is no name of a class")
    if isinstance(entry, dict):
        if wrong := [str(key) for key in entry if key != "source"]:
            raise refuse(f"{name}: {unknown_name('setting', wrong[0], ['source'])}")
        entry = entry.get("source")
    elif name not in (IGNORE, BACKGROUND):
        raise refuse(f"{name}: has no 'source'")
    listed = entry if isinstance(entry, list) else [entry]
    parts = [part if isinstance(part, list) else [part] for part in listed]
    for key in [key for part in parts for key in part] or [None]:
        if not isinstance(key, int | str) or isinstance(key, bool) or key == "":
            raise refuse(f"{name}: {key!r} is neither a value nor a name")
    return tuple(tuple(key.strip().casefold() if isinstance(key, str) else key for key in part) for part in parts)


def mapped(source: Source, classes: ClassMap | None, folder: Path) -> Source:
    """`source`, which lies in `folder`, with the classes of `classes` for its own.

    Raises `CaseError` where no label has a structure that is listed, unless the source's problems may be the reason.
    """
    if classes is None:
        if source.unlisted:
            what = "%s: labels in RTSTRUCTs and SEGs are not read, as no %s there says what is what (there are %s)"
            cure = "write one, as in `liver: {source: Liver}`"
            logger.warning(f"{what}; {cure}", folder, FILE_NAME, _shown(source.unlisted))
        return source
    labelled = [_with_reserved(case, classes) for case in source.cases if case.labels]
    unknown = _unknown(labelled, source.unlisted, classes)
    if unknown and not source.problems:
        raise unknown[0]
    kept, problems = [], [*source.problems, *unknown]
    for case in source.cases:
        try:
            kept.append(_mapped(_with_reserved(case, classes), classes) if case.labels else case)
        except CaseError as problem:
            problems.append(problem)
    listed = {key for parts in classes.parts.values() for part in parts for key in part}
    passed = sum(not _keys(case, value, name) & listed for case in labelled for value, name in case.label_values)
    if passed:
        logger.info("%s: %d structures of %d cases belong to no class", classes.file, passed, len(labelled))
    names = tuple(name for name in classes.parts if name not in (IGNORE, BACKGROUND))
    return replace(source, cases=tuple(kept), classes=names, problems=tuple(problems))


def _keys(case: Case, value: int, name: str) -> set[int | str]:
    """What `classes.yaml` may call a structure of `case`."""
    return {name.strip().casefold()} | ({value} if case.label_format == "voxels" else set())


def _with_reserved(case: Case, classes: ClassMap) -> Case:
    """`case` with the values under "ignore" and "background" that its label file may hold and nothing else names."""
    if case.label_format != "voxels":
        return case
    named = dict(case.label_values)
    listed = {key for name in (IGNORE, BACKGROUND) for part in classes.parts.get(name, ()) for key in part}
    reserved = {key: str(key) for key in listed if isinstance(key, int) and key not in named}
    return replace(case, label_values=tuple(sorted((named | reserved).items())))


def _unknown(labelled: Sequence[Case], unlisted: Sequence[str], classes: ClassMap) -> list[CaseError]:
    """What is listed and no case has, with what there is instead.

    A value under "ignore" or "background" says what would be meant if it came.
    """
    pairs = {
        (value if case.label_format == "voxels" else None, name)
        for case in labelled
        for value, name in case.label_values
    }
    known = {key for case in labelled for value, name in case.label_values for key in _keys(case, value, name)}
    names = sorted({name for _, name in pairs} | set(filter(None, unlisted)))
    shown = sorted(name if value is None or str(value) == name else f"{name} ({value})" for value, name in pairs)
    errors = []
    for class_name, parts in classes.parts.items():
        for part in (part for part in parts if not known.intersection(part)):
            if class_name in (IGNORE, BACKGROUND) and all(isinstance(key, int) for key in part):
                continue
            what = unknown_name("value" if isinstance(part[0], int) else "structure", str(part[0]), names)
            cure = f"correct what {class_name} is read from; there are {_shown([*shown, *unlisted])}"
            errors.append(CaseError(f"{what}; no label has it", where=classes.file, cure=cure))
    return errors


def _shown(names: Sequence[str]) -> str:
    """The first of `names`, each once, and how many more there are; empty ones may not be told."""
    told = sorted({name for name in names if name}, key=str.casefold)
    parts = [*told[:MAX_SHOWN], *([f"{len(told) - MAX_SHOWN} more"] if len(told) > MAX_SHOWN else [])]
    if hidden := sum(not name for name in names):
        parts.append(f"{hidden} whose names may be a patient's and are not shown")
    return ", ".join(parts) or "no structures at all"


def _mapped(case: Case, classes: ClassMap) -> Case:
    found: dict[int, str] = {}
    annotated, doubtful = [], []
    for class_name, parts in classes.parts.items():
        hits = [[pair for pair in case.label_values if _keys(case, *pair) & set(part)] for part in parts]
        for one in hits:
            if case.label_format != "voxels" and len({name.strip().casefold() for _, name in one}) > 1:
                what = f"has {len(one)} structures for one part of {class_name}"
                raise CaseError(what, where=case.labels[0], cure=f"leave a name out of {classes.file}")
            found |= {value: class_name for value, _ in one}
        names = {name for one in hits for _, name in one}
        if class_name not in (IGNORE, BACKGROUND) and all(hits) and names <= set(case.annotated):
            annotated.append(class_name)
            doubtful += [class_name] if names & set(case.doubtful) else []
    return replace(_with_values(case, found), annotated=tuple(annotated), doubtful=tuple(doubtful))


def _with_values(case: Case, found: dict[int, str]) -> Case:
    """`case` with the structures that have a class in `found`; of a label file the others are background."""
    if case.label_format == "voxels":
        rest = ((value, IGNORE if name == IGNORE else BACKGROUND) for value, name in case.label_values)
        return replace(case, label_values=tuple((value, found.get(value, name)) for value, name in rest))
    if not found:
        return replace(case, split="unlabelled", labels=(), label_values=(), label_format="voxels")
    values = sorted(found.items())
    if case.label_format == "masks":
        labels = tuple(case.labels[position - 1] for position, _ in values)
        return replace(case, labels=labels, label_values=tuple(enumerate((name for _, name in values), start=1)))
    return replace(case, label_values=tuple(values))
