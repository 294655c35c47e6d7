"""What became of every file that the sources of a build hold, each counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from mixcl_dist.data_shards.building.spool import Quarantined
from mixcl_dist.data_shards.sources import Case, Source

QUARANTINED = "quarantined"


def census(
    opened: Sequence[Source], splits: Collection[str], refused: Sequence[Quarantined], used: Collection[str]
) -> Counter[str]:
    """How many files are what, in words, the most first; of a file with two parts the one that is used counts.

    `used` are the names of the cases in the shards.
    """
    fates: dict[Path, str] = {}
    for source in opened:
        fates |= source.others
    named = Counter(case.name for source in opened for case in source.cases if case.split in splits)
    accused = Counter(entry.case for entry in refused)
    met: set[str] = set()
    for case in (case for source in opened for case in source.cases):
        if case.split not in splits:
            _tell(fates, case, f"of {case.split} cases, kept out")
        elif case.name in met or case.name not in used or accused[case.name] >= named[case.name]:
            _tell(fates, case, QUARANTINED)
        else:
            scan = "slices of series" if case.format == "dicom" else "scans"
            fates |= dict.fromkeys(case.files, f"{scan} in the shards")
            fates |= dict.fromkeys(case.labels, "labels")
        met |= {case.name} if case.split in splits else set()
    return Counter(dict(Counter(fates.values()).most_common()))


def _tell(fates: dict[Path, str], case: Case, fate: str) -> None:
    """Say it of the inputs of `case` that are not of a case in the shards."""
    for file in case.inputs:
        fates.setdefault(file, fate)
