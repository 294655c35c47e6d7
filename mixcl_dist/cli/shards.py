"""`mixcl shards`: build, inspect, verify, dedup, trace."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from mixcl_dist.cli.verbs import add_verb, add_verbs, config_of


def add_shards(verbs: Any) -> None:
    shards = verbs.add_parser("shards", allow_abbrev=False, help="build, inspect, verify and compare shards of patches")
    on_shards = add_verbs(shards)
    example = "mixcl shards build archive/dataset.json more_scans/ --out shards --build.spacing_mm 2,2,2"
    add = add_verb(on_shards, "build", _shards_build, "CT volumes → shards of patches, or more of them", example)
    sources = "dataset.json (MONAI/Decathlon), nnU-Net folder, folder of masks, or of NIfTI, NRRD, MetaImage, DICOM"
    add("source", nargs="+", type=Path, metavar="SOURCE", help=sources)
    out = "folder to write; going on where it was interrupted, appending what is new"
    add("--out", type=Path, required=True, metavar="SHARDS", help=out)
    exclude = "sources or shards all of whose scans are kept out, those to test on too, under whatever name (see dedup)"
    add("--exclude", nargs="+", action="extend", type=Path, default=[], metavar="LIST", help=exclude)
    ray = "work on the Ray cluster at ADDRESS (default auto), which must see SOURCE and SHARDS as this machine does"
    add("--ray", nargs="?", const="auto", metavar="ADDRESS", help=ray)

    folder = "folder made by `mixcl shards build`"
    example = "mixcl shards inspect shards --picture sheet.png"
    add = add_verb(on_shards, "inspect", _shards_inspect, "what a set of shards holds", example, takes_settings=False)
    add("shards", type=Path, metavar="SHARDS", help=folder)
    add("--picture", type=Path, metavar="PNG", help="draw middle slices of patches from different cases, with labels")
    window = "HU that are black and white in the picture (default -160 240)"
    add("--window", nargs=2, type=float, default=(-160.0, 240.0), metavar=("LOW", "HIGH"), help=window)

    summary, example = "check every digest", "mixcl shards verify shards"
    add = add_verb(on_shards, "verify", _shards_verify, summary, example, takes_settings=False)
    add("shards", type=Path, metavar="SHARDS", help=folder)

    summary = "find scans that come twice, also resampled, clipped or cropped a little"
    example = "mixcl shards dedup shards --against test/dataset.json"
    add = add_verb(on_shards, "dedup", _shards_dedup, summary, example, takes_settings=False)
    add("source", nargs="+", type=Path, metavar="SHARDS|SOURCE", help="shards, or what shards are to be built from")
    add(
        "--against",
        nargs="+",
        action="extend",
        type=Path,
        required=True,
        metavar="LIST",
        help="the same, of the cases to test on: every image it names",
    )

    summary, example = "which file a pseudonym stands for", "mixcl shards trace ct-4b08f21ad3991b27 archive/"
    add = add_verb(on_shards, "trace", _shards_trace, summary, example, takes_settings=False)
    add("name", metavar="PSEUDONYM", help="name of a case, as messages and shards have it")
    add("source", nargs="*", type=Path, metavar="SOURCE", help="where to look beside what builds have kept")


def _shards_build(options: argparse.Namespace) -> int:
    from mixcl_dist.data_shards.building.build import build
    from mixcl_dist.progress import ProgressReport

    config = config_of(options)
    with _elsewhere(options) as run:
        result = build(
            options.source, options.out, config.build, ProgressReport("build"), exclude=options.exclude, run=run
        )
    manifest = result.manifest
    print(f"{options.out}: {len(manifest.cases)} cases, {manifest.patches} patches, {len(manifest.shards)} shards")
    if result.added < len(manifest.cases):
        print(f"{result.added} cases are new, {result.absent} of the others are in none of these sources and stay")
    if faces := [case.name for case in manifest.cases if case.shows_face]:
        names = ", ".join(faces[:5]) + (", …" if len(faces) > 5 else "")
        cure = "keep the shards where the scans may be, or deface the scans and build anew"
        print(
            f"mixcl: {len(faces)} cases show a face, by which a patient can be known: {names}; {cure}", file=sys.stderr
        )
    for problem in result.quarantined:
        print(f"quarantined: {problem}", file=sys.stderr)
    if result.quarantined:
        listing = options.out / ".build" / "quarantine.jsonl"
        print(f"mixcl: {len(result.quarantined)} quarantined, listed in {listing}", file=sys.stderr)
    shown = ", ".join(f"{count} {what}" for what, count in result.files.items())
    print(f"{sum(result.files.values())} files seen: {shown}")
    return 1 if result.quarantined else 0


def _elsewhere(options: argparse.Namespace) -> AbstractContextManager[Any]:
    """Where a build's work runs: on a Ray cluster, or (None) where the build itself does."""
    if options.ray is None:
        return nullcontext()
    from mixcl_dist.cluster.work import on_ray

    return on_ray(options.ray, written=options.out, read=[*options.source, *options.exclude])


def _shards_inspect(options: argparse.Namespace) -> None:
    from mixcl_dist.data_shards.inspection.summary import inspect, table

    if options.window[0] >= options.window[1]:
        options.parser.error(f"--window {options.window[0]:g} {options.window[1]:g}: give the lower HU first")
    print(table(inspect(options.shards)))
    if options.picture:
        from mixcl_dist.data_shards.inspection.picture import contact_sheet

        contact_sheet(options.shards, options.picture, options.window)
        print(f"picture in {options.picture}")


def _shards_verify(options: argparse.Namespace) -> int:
    from mixcl_dist.data_shards.format.shard import ANEW
    from mixcl_dist.data_shards.inspection.verify import verify
    from mixcl_dist.progress import ProgressReport

    problems = verify(options.shards, _cores(), ProgressReport("verify"))
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{options.shards}: {'whole' if not problems else f'{len(problems)} problems; {ANEW}'}")
    return 1 if problems else 0


def _shards_dedup(options: argparse.Namespace) -> int:
    from mixcl_dist.data_shards.building.dedup import matches, scans_of
    from mixcl_dist.data_shards.building.processes import in_processes
    from mixcl_dist.progress import ProgressReport

    paths = dict.fromkeys([*options.source, *options.against])
    scans = scans_of(list(paths), in_processes(_cores()), ProgressReport("dedup"), whole=options.against)
    ones, others = (
        [scan for scan in scans.found if Path(scan.origin) in group] for group in (options.source, options.against)
    )
    found = matches(ones, others)
    for match in found:
        print(match)
    for problem in scans.problems:
        print(f"not compared: {problem}", file=sys.stderr)
    print(f"pairs that are one scan: {len(found)}; {len(ones)} scans held against {len(others)}")
    return 1 if found or scans.problems else 0


def _shards_trace(options: argparse.Namespace) -> int:
    from mixcl_dist.data_shards.sources import open_source
    from mixcl_dist.data_shards.sources.pseudonym import KEY_VARIABLE, traced
    from mixcl_dist.data_shards.volume import shown

    files = traced() | {case.name: case.files[0] for path in options.source for case in open_source(path).cases}
    if options.name in files:
        print(shown(files[options.name]))
        return 0
    cure = f"name the sources that it was built from, and set {KEY_VARIABLE} as it was then"
    print(f"mixcl: {options.name}: no build of this user has named a scan so; {cure}", file=sys.stderr)
    return 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
