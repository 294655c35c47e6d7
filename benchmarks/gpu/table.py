"""The few-label table by the product's own command, for as long as there is time; and shards for it and for others."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from worker import work  # first, as it makes what follows importable

# isort: split
from stages import SIDE_BY_SIDE

from mixcl_dist import cli
from mixcl_dist.report import table_text, write_report

MARGIN = {16: 24, 48: 64, 96: 112}  #: edge of a patch that views of an edge are drawn from
ENDING = 15  #: seconds for the report, and for copying what is kept
#: What comes back of a table: all that its report is made from, and that says what is done; no networks.
KEPT = (
    "*.json*", "*.csv", "config.yaml", "report/*.html", "pretrain/*/probe.json", "probe/*/probe.json",
    "trial/**/dice.json", "trial/**/run.json", "trial/**/curve.jsonl",
)  # fmt: skip
#: With `--tiny`: of everything as little as runs at all.
TINY = (
    "--network.filters", "4,8,16", "--network.voxel_dim", "16", "--views.size", "16,16,16", "--rows.per_view_pair", "8",
    "--pretrain.batch_size", "2", "--pretrain.steps", "2", "--finetune.steps", "2", "--finetune.patch_size", "16,16,16",
    "--finetune.batch_size", "1", "--table.baselines", "random", "--table.margin", "-1",
    "--table.scans", "1", "--table.other_organs.scans", "[1]",
    "--table.stages.mixcl.settings", "{pretrain.steps: 2}", "--only", "trial/[ms]*c[hl]-n1-s0",
)  # fmt: skip
TINY_CASES = {"training": 6, "validation": 1}


def measure(item: str, options: argparse.Namespace) -> dict:
    kind, _, edge = item.partition("/")[2].partition("-")
    return build_shards(item.partition("/")[2], options, int(edge)) if kind == "shards" else few_label(options)


def build_shards(name: str, options: argparse.Namespace, edge: int) -> dict:
    """Shards for views of an edge; `name` is their folder's, too."""
    patch = ",".join([str(MARGIN[edge])] * 3)
    workers = str(len(os.sched_getaffinity(0)))
    settings = ["--recipe", "few_label", "--build.patch_size", patch, "--build.workers", workers]
    if code := cli.main(["shards", "build", str(cases(options)), "--out", str(options.work / name), *settings]):
        raise SystemExit(code)
    return {"text": f"patches of {MARGIN[edge]}³"}


def few_label(options: argparse.Namespace) -> dict:
    """All trials for which there is time, many on one GPU; an earlier table in OUT is gone on with."""
    table, kept = options.work / "few_label", options.out / "few_label"
    if kept.exists() and not table.exists():
        copy(kept, table, KEPT)
    shards = options.work / f"shards-{16 if options.tiny else 48}"
    words = ["--data", str(cases(options)), "--shards", str(shards), "--out", str(table), "--recipe", "few_label"]
    words += ["--workers", str(2 if options.tiny else SIDE_BY_SIDE), "--seconds", str(options.seconds - ENDING)]
    settings = [*TINY, "--budget.development", development(options)] if options.tiny else ["--views.size", "48,48,48"]
    code = cli.main(["table", *words, *settings])
    if not (table / "plan.json").exists():  # refused
        raise SystemExit(code)
    write_report(table)
    copy(table, kept, KEPT)
    found = json.loads((kept / "table.json").read_text())
    counts = {"done": found["done"], "planned": found["planned"]}
    text = f"{found['done']} of {found['planned']} planned trials: {found['headline']}"
    partial = found["done"] < (2 if options.tiny else found["planned"])
    return {"passed": code == 0, "partial": partial, "text": text, "table": table_text(table), **counts}


def copy(source: Path, target: Path, patterns: Iterable[str]) -> None:
    for path in (path for pattern in patterns for path in source.glob(pattern)):
        there = target / path.relative_to(source)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, there)


def cases(options: argparse.Namespace) -> Path:
    """The list of cases; with `--tiny` a list of a few."""
    whole = options.work / "ct" / "dataset.json"
    if not options.tiny:
        return whole
    listed = json.loads(whole.read_text())
    few = whole.with_name("few.json")
    few.write_text(json.dumps(listed | {split: listed[split][:count] for split, count in TINY_CASES.items()}))
    return few


def development(options: argparse.Namespace) -> str:
    """With `--tiny` the last three of its training cases."""
    listed = json.loads(cases(options).read_text())
    return ",".join(Path(entry["image"]).name.partition(".")[0] for entry in listed["training"][-3:])


if __name__ == "__main__":
    work(__doc__, measure)
