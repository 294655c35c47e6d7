"""What a folder of shards holds already, and what is therefore left to be built."""

from __future__ import annotations

import itertools
import json
import logging
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from mixcl_dist.data_shards.building.dedup import Scan, Scans, matches, pairs_within, scans_of, scans_of_shards
from mixcl_dist.data_shards.building.processes import Mapper
from mixcl_dist.data_shards.building.settings import BuildConfig, BuildError, Progress
from mixcl_dist.data_shards.building.shuffle import draw_note, unfinished_shards
from mixcl_dist.data_shards.building.spool import (
    Outcome,
    Quarantined,
    Spooled,
    choose_cases,
    read_quarantine,
    refusal,
    stamp_of,
    write_quarantine,
)
from mixcl_dist.data_shards.catalogue import IGNORED, Catalogue, merged, sanitised
from mixcl_dist.data_shards.format.manifest import FILE_NAME, CaseRecord, Manifest
from mixcl_dist.data_shards.sources import Case, Source
from mixcl_dist.data_shards.sources.pseudonym import PREFIX
from mixcl_dist.data_shards.storage.publishing import publish

logger = logging.getLogger(__name__)

ELSEWHERE = "give another --out, or remove this one"
KEPT = {"source_digest": "voxels", "label_digest": "labels", "reliable": "annotated classes", "split": "split"}
"""What of a case must stay as it is in the shards, and what it is called."""


@dataclass(frozen=True)
class Changes:
    fresh: dict[str, tuple[Case, str]]
    """Case name → the case and its stamp: those that are to be read."""
    stamps: dict[str, str]
    """Case name → stamp, of all cases."""
    refused: list[Quarantined]
    absent: int
    """Cases in the shards that none of the sources has."""


def finished(out: Path, config: BuildConfig) -> Manifest | None:
    """The set of shards in `out`, None while there is none; raises `BuildError` where this build cannot go on there."""
    base = Manifest.load(out) if (out / FILE_NAME).exists() else None
    path = out / ".build" / "settings.json"
    if base or path.exists():
        begun = base.settings if base else json.loads(path.read_bytes())
        if differs := [name for name, value in config.recorded().items() if begun.get(name, value) != value]:
            name = differs[0]
            raise BuildError(f"{out}: was begun with build.{name} = {begun[name]}; keep it, {ELSEWHERE}")
    if not draw_note(out).exists() and (strange := unfinished_shards(out, len(base.shards) if base else 0)):
        raise BuildError(f"{strange[0]}: is not of this build; {ELSEWHERE}")
    for shard in base.shards if base else ():
        stored = out / shard.file
        if not stored.exists() or stored.stat().st_size != shard.bytes:
            raise BuildError(f"{stored}: is not as it was built; remove {out} and build again")
    with publish(path) as file:
        file.write(json.dumps(config.recorded(), indent=1).encode())
    return base


def named_apart(opened: Sequence[Source], base: Manifest | None) -> list[Source]:
    """The sources with cases that share a name told apart: who came first keeps it, others are called after their data
    set as well.

    In shards a case keeps the name that it has there. Cases of data sets that share a name, too, stay as they are, to
    be refused.
    """
    stored = {case.name: case.dataset for case in base.cases} if base else {}
    listed = {case.dataset for source in opened for case in source.cases}
    owner = {name: dataset for name, dataset in stored.items() if dataset in listed}  # or else its folder was renamed
    apart = []
    for source in opened:
        cases = []
        for case in source.cases:
            longer = f"{sanitised(case.dataset)}-{case.name}"
            own = longer not in stored and owner.setdefault(case.name, case.dataset) == case.dataset
            cases.append(case if own else replace(case, name=longer))
        if renamed := [new.name for new, old in zip(cases, source.cases, strict=True) if new.name != old.name]:
            what = "%d cases of %s have names of others, so their names here begin with its own, as in %s"
            logger.warning(
                f"{what}; list the data set first that budgets are to name", len(renamed), source.name, renamed[0]
            )
        apart.append(replace(source, cases=tuple(cases)))
    return apart


def tell_of_namesakes(opened: Sequence[Source], base: Manifest | None) -> None:
    """Say where several data sets are called alike, so that what is said of one by its name is said of all of them.

    Cases of one name among them are another matter: they are refused. Bare folders have no names of their own.
    """
    cases: dict[str, list[set[str]]] = defaultdict(list)
    for dataset in {case.dataset for case in base.cases} if base else ():
        cases[dataset].append({case.name for case in base.cases if case.dataset == dataset} if base else set())
    for source in opened:
        if {case.dataset for case in source.cases} == {source.name}:
            cases[source.name].append({case.name for case in source.cases})
    for name, alike in cases.items():
        if any(one.isdisjoint(other) for one, other in itertools.combinations(alike, 2)):
            what = "%d data sets are called %s, so they share one label budget and one line in every count"
            logger.warning(f"{what}; rename the folder of one of them if that is not meant", len(alike), name)


def grown_catalogue(base: Manifest | None, opened: Sequence[Source]) -> Catalogue:
    """The classes of the shards, which keep their numbers, and behind them those that the sources add."""
    try:
        catalogue = merged([base.classes if base else (), *(source.classes for source in opened)])
    except ValueError as error:
        raise BuildError(str(error)) from None
    spelled: dict[str, str] = {}
    for name in catalogue.classes:
        other = spelled.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), name)
        if other != name:
            logger.warning("classes %r and %r are two; if they are one, say so in a classes.yaml", other, name)
    return catalogue


def changes(
    out: Path, base: Manifest | None, opened: Sequence[Source], catalogue: Catalogue, splits: Sequence[str]
) -> Changes:
    """Which cases are to be read: all but those that are in the shards, or known as bad, with the same files."""
    cases, refused = choose_cases(opened, splits)
    stored = {case.name for case in base.cases} if base else set()
    stamps = {case.name: stamp_of(case, catalogue) for case in cases}
    known = {name: stamp for name, stamp in _read_stamps(out).items() if name in stored}
    bad = {entry.case: entry for entry in read_quarantine(out) if entry.stamp}
    fresh = {}
    for case in cases:
        if (entry := bad.get(case.name)) and entry.stamp == stamps[case.name]:
            refused.append(entry)
        elif known.get(case.name) != stamps[case.name]:
            fresh[case.name] = (case, stamps[case.name])
    elsewhere = [case for source in opened for case in source.cases if case.split not in splits]
    for case in elsewhere:
        if case.name in stored:
            error = refusal(case, f"case {case.name} is in the shards, but its split is {case.split} now", ELSEWHERE)
            refused.append(Quarantined.of(case.name, error))
    absent = stored - {case.name for source in opened for case in source.cases}
    return Changes(fresh, stamps, refused, len(absent))


def read_excluded(exclude: Sequence[Path], out: Path, base: Manifest | None, run: Mapper, progress: Progress) -> Scans:
    """The scans to be kept out; raises `BuildError` where that cannot be done."""
    excluded = scans_of(exclude, run, progress, whole=exclude)
    if excluded.problems:
        raise BuildError(f"a scan to be kept out cannot be read: {excluded.problems[0]}")
    if base and excluded.found and (leaks := matches(scans_of([out], run, progress).found, excluded.found)):
        raise BuildError(f"{out}: holds {len(leaks)} scans to be kept out, the first: {leaks[0]}; {ELSEWHERE}")
    return excluded


def sort_outcomes(
    fresh: Mapping[str, tuple[Case, str]], outcomes: Mapping[str, Outcome], base: Manifest | None, excluded: Scans
) -> tuple[list[Spooled], list[Quarantined]]:
    """The cases to be appended, in the order of `fresh`, and those that cannot be; of copies of a scan one is used."""
    kept_out = _kept_out(fresh, outcomes, excluded)
    if excluded.found and not kept_out:
        logger.warning("none of the %d scans to be kept out is among these cases", len(excluded.found))
    stored = {case.name: case for case in base.cases} if base else {}
    first = {case.source_digest: case.name for case in stored.values()}
    used: list[Spooled] = []
    refused: list[Quarantined] = []
    for name, (case, _) in fresh.items():
        outcome = outcomes[name]
        if isinstance(outcome, Quarantined):
            refused.append(outcome)
        elif name in stored:
            refused += _changes(case, stored[name], outcome.record)
        elif other := first.get(outcome.record.source_digest):
            which = f" (mixcl shards trace {other} tells which file that is)" if other.startswith(PREFIX) else ""
            error = refusal(case, f"has the same voxels as case {other}", f"remove one of them{which}")
            refused.append(Quarantined.of(name, error))
        elif name in kept_out:
            refused.append(kept_out[name])
        else:
            first[outcome.record.source_digest] = name
            used.append(outcome)
    return used, refused


def tell_doubts(used: Sequence[Spooled], out: Path, base: Manifest | None) -> None:
    """Say what cannot be known to be wrong: cases that look like one scan, and labels without a labelled voxel."""
    pairs = pairs_within([_scan_of(one) for one in used], scans_of_shards(out) if base else [])
    if pairs:
        what = "%d pairs of cases look like one scan under two names, the nearest are %s and %s (distance %.4f)"
        (one, other, distance) = pairs[0]
        cure = "see them by `mixcl shards dedup %s --against %s`, and leave one of each out"
        logger.warning(f"{what}; {cure}", len(pairs), one.name, other.name, distance or 0.0, out, out)
    labelled = [one for one in used if one.record.labelled]
    empty = [one.record.name for one in labelled if {0, IGNORED}.issuperset(chain(*one.present))]
    if empty:
        what = "%d of %d new labels hold no class at all, that of %s first, so all of theirs count as absent"
        logger.warning(f"{what}; check them if that is not meant", len(empty), len(labelled), empty[0])


def _scan_of(one: Spooled) -> Scan:
    mark = np.frombuffer(bytes.fromhex(one.fingerprint), np.int8)
    return Scan(one.record.name, "", one.record.source_digest, mark)


def _kept_out(
    fresh: Mapping[str, tuple[Case, str]], outcomes: Mapping[str, Outcome], excluded: Scans
) -> dict[str, Quarantined]:
    spooled = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Spooled)}
    scans = [_scan_of(one) for one in spooled.values()]
    found = {}
    for match in reversed(matches(scans, excluded.found)):  # the nearest last, so that it is the one that is named
        how = "the same voxels" if match.distance is None else f"distance {match.distance:.4f}"
        what = f"is kept out as {match.other.name} of {match.other.origin} ({how})"
        error = refusal(fresh[match.one.name][0], what, "nothing needs to be done")
        found[match.one.name] = Quarantined.of(match.one.name, error)
    return found


def _changes(case: Case, stored: CaseRecord, now: CaseRecord) -> list[Quarantined]:
    differs = [word for field, word in KEPT.items() if getattr(stored, field) != getattr(now, field)]
    if not differs:
        return []
    what = f"case {case.name} has other {' and '.join(differs)} than in the shards, which keep what they have"
    return [Quarantined.of(case.name, refusal(case, what, f"rename it if it is another scan; else {ELSEWHERE}"))]


def nothing_usable(out: Path, refused: Sequence[Quarantined]) -> str:
    """One line that says so, with the first reason; the others go to the quarantine list."""
    write_quarantine(out, refused)
    first, *others = [str(entry.error) for entry in refused] or ["the sources hold none of build.splits"]
    more = f" ({len(others)} more in {out / '.build' / 'quarantine.jsonl'})" if others else ""
    return f"no case could be used: {first}{more}"


def remember(out: Path, done: Changes, manifest: Manifest, refused: Sequence[Quarantined]) -> None:
    """Leave behind what the next build in `out` need not find out again."""
    write_quarantine(out, refused)
    changed = {entry.case for entry in refused}
    stamps = _read_stamps(out) | {name: stamp for name, stamp in done.stamps.items() if name not in changed}
    stored = {case.name for case in manifest.cases}
    with publish(out / ".build" / "stamps.json") as file:
        file.write(json.dumps({name: stamp for name, stamp in stamps.items() if name in stored}).encode())


def _read_stamps(out: Path) -> dict[str, str]:
    path = out / ".build" / "stamps.json"
    return json.loads(path.read_bytes()) if path.exists() else {}
