"""The classes of all data sets under one numbering, and what a label leaves open."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mixcl_dist.data_shards.errors import DataError

IGNORED = 255
"""In a label: a voxel of which nobody knows the class."""
MAX_CLASSES = IGNORED - 1
"""Labels are stored as uint8."""
WORD_BITS = 63
"""Of an int64 word of a candidate set; the sign stays free, so that words are ordered as their bits are."""


class CatalogueError(DataError):
    """Classes that do not fit one catalogue; the message is one line with the cure."""


@dataclass(frozen=True)
class Catalogue:
    """Class names in label order: label k > 0 is `classes[k - 1]`, 0 is everything else, `IGNORED` is unknown."""

    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            twice = next(name for number, name in enumerate(self.classes) if name in self.classes[:number])
            raise CatalogueError(f"class {twice!r} comes twice; give each class one name")
        if unprintable := [name for name in self.classes if not name.isprintable()]:
            raise CatalogueError(f"class {unprintable[0]!a} cannot be printed; give it another name")
        if len(self.classes) > MAX_CLASSES:
            raise CatalogueError(f"{len(self.classes)} classes; at most {MAX_CLASSES} fit: leave some sources out")

    def index(self, name: str) -> int:
        """The label of class `name`, counted from 1; raises `KeyError` that names the nearest class."""
        try:
            return self.classes.index(name) + 1
        except ValueError:
            raise KeyError(unknown_name("class", name, self.classes)) from None

    def candidate_bits(self, annotated: Sequence[str] | None) -> np.ndarray:
        """Which classes a voxel of each label may belong to, as (C + 2, W) int64: a bit mask of W words.

        Row k is of label k, the last one of `IGNORED`: a label `l` is looked up as `bits[np.minimum(l, C + 1)]`.
        Class k has bit k - 1, counted through words of `WORD_BITS`; bits C and C + 1 stand for "none of the
        catalogue". They are two because two voxels that are both none of the catalogue need not be the same tissue. An
        annotated label is that class alone; the background is anything but the annotated classes; an ignored voxel,
        and without annotation every voxel, may be anything.
        """
        count = len(self.classes) + 2
        words = -(-count // WORD_BITS)
        member = np.zeros((count, words * WORD_BITS), dtype=bool)
        member[:, :count] = True
        for label in map(self.index, annotated or ()):
            member[label] = False
            member[label, label - 1] = True
            member[0, label - 1] = False
        bits = np.int64(1) << np.arange(WORD_BITS)
        return (member.reshape(count, words, WORD_BITS) * bits).sum(axis=2)


def merged(classes_of_sources: Iterable[Sequence[str]]) -> Catalogue:
    """One catalogue over sources: a class that several have is the same class; first met, first numbered."""
    return Catalogue(tuple(dict.fromkeys(name for classes in classes_of_sources for name in classes)))


def unknown_name(kind: str, name: str, names: Sequence[str]) -> str:
    """One line that refuses `name` and offers the nearest of `names`."""
    folded = {known.casefold(): known for known in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    return f"{kind} {name!r} is unknown" + (f"; did you mean {folded[close[0]]!r}?" if close else "")


def sanitised(name: str) -> str:
    """`name` in the letters that a case's name may have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "case"
