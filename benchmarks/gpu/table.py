"""The few-label table by the product's own command, for as long as there is time; and shards for it and for others."""

from __future__ import annotations

import argparse
import json
import lzma
import os
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from worker import work  # first, as it makes what follows importable

# isort: split
import pack
from stages import KEPT_TABLE, SIDE_BY_SIDE

from mixcl_dist import cli
from mixcl_dist.cluster import checkpoint
from mixcl_dist.report import table_text, write_report
from mixcl_dist.studies.ledger import Ledger
from mixcl_dist.studies.table.work import FINISHED

MARGIN = {16: 24, 48: 64, 96: 112}  #: edge of a patch that views of an edge are drawn from
ENDING = 30  #: seconds for the report, and for packing what is kept
LEAST = 10  #: seconds; with less left no trial is begun
FEW = 3  #: pre-trainings side by side, which fill the GPU
#: Names of the pre-trainings that all others go on from, or are held against: those of a budget or a fold end in it.
RUN_ONCE = "pretrain/*[a-z]"
KEPT_BYTES = int(15.9 * 2**20)  #: of a file of 16 MiB, the largest that such a machine hands back
#: All that a table's report is made from, and that says what is done.
RECORDS = (
    "*.json*", "*.csv", "config.yaml", "report/*.html", "pretrain/*/probe.json", "probe/*/probe.json",
    "trial/**/dice.json", "trial/**/run.json", "trial/**/curve.jsonl",
)  # fmt: skip
#: Of a run, what another can start from, or go on from together with a checkpoint.
RUN = ("*.json", "*.jsonl", "config.yaml", "seen.npz", "*.safetensors")
#: Fast, and a run's two networks, which are one but for the heads, take the room of one.
FAST = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 2**26}]
#: With `--tiny`: of everything as little as runs at all.
TINY = (
    "--network.filters", "4,8,16", "--network.voxel_dim", "16", "--views.size", "16,16,16", "--rows.per_view_pair", "8",
    "--pretrain.batch_size", "2", "--pretrain.steps", "2", "--finetune.steps", "2", "--finetune.patch_size", "16,16,16",
    "--finetune.batch_size", "1", "--table.baselines", "random", "--table.margin", "-1",
    "--table.scans", "1", "--table.other_organs.scans", "[1]",
    "--table.stages.mixcl.settings", "{pretrain.steps: 2}",
)  # fmt: skip
TINY_CELLS = ("--only", "trial/[ms]*c[hl]-n1-s0")
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
    """The pre-trainings that are run once, then all trials for which there is time; goes on where OUT's archive ends.

    The former are few at a time and have the GPU for themselves, so that they end, and are kept, in a short loan.
    """
    table, kept = options.work / "few_label", options.out / KEPT_TABLE
    if kept.exists() and not table.exists():
        unpack(kept, table)
    end = time.monotonic() + options.seconds - ENDING
    few, many = (str(2 if options.tiny else number) for number in (FEW, SIDE_BY_SIDE))
    code = run_table(options, table, end, "--workers", few, "--only", RUN_ONCE)
    if end - time.monotonic() >= (0 if options.tiny else LEAST):
        code = run_table(options, table, end, *(TINY_CELLS * options.tiny), "--workers", many, "--pretrainings", few)
    write_report(table)
    keep(table, kept)
    found = json.loads((table / "table.json").read_text())
    counts = {"done": found["done"], "planned": found["planned"]}
    text = f"{found['done']} of {found['planned']} planned trials: {found['headline']}"
    left = sum(item["kind"] == "trial" for item in unsettled(table))
    partial = left > (found["planned"] - 2 if options.tiny else 0)
    return {"passed": code == 0, "partial": partial, "text": text, "table": table_text(table), **counts}


def run_table(options: argparse.Namespace, table: Path, end: float, *words: str) -> int:
    """The product's own command, until `end`; ends the program where it refuses."""
    shards = options.work / f"shards-{16 if options.tiny else 48}"
    paths = ["--data", str(cases(options)), "--shards", str(shards), "--out", str(table), "--recipe", "few_label"]
    settings = [*TINY, "--budget.development", development(options)] if options.tiny else ["--views.size", "48,48,48"]
    code = cli.main(["table", *paths, *settings, "--seconds", f"{end - time.monotonic():.0f}", *words])
    if not (table / "plan.json").exists():
        raise SystemExit(code)
    return code


def keep(table: Path, archive: Path, most: int = KEPT_BYTES) -> None:
    """Pack the records and, as far as they fit into `most` bytes, networks and checkpoints that are gone on from."""
    folder, size = archive.parent, 0
    partial = folder / f".{archive.name}.partial"
    with partial.open("wb") as whole:
        for number, files in enumerate(groups(table)):
            part = folder / f".{number}.tar.xz"
            pack.write_archive(part, ((path, str(path.relative_to(table))) for path in files), FAST)
            content = part.read_bytes()
            part.unlink()
            if number and size + len(content) > most:
                break
            size += whole.write(content)
    partial.replace(archive)


def groups(table: Path) -> Iterator[list[Path]]:
    """The files of each thing to keep, the records first, then what most of what is left to do starts from."""
    yield matching(table, RECORDS)
    left = unsettled(table)
    starts = Counter(item["start"] for item in left if item["start"])
    for name, _ in starts.most_common():
        run = table / name
        if any((run / FINISHED[kind]).exists() for kind in ("pretrain", "supervised")):
            yield matching(run, RUN)
    for run in (table / item["name"] for item in left if item["kind"] == "pretrain"):
        if newest := _newest(run):
            yield [*matching(run, RUN), *pack.files_in(newest)]


def _newest(run: Path) -> Path | None:
    """The newest whole checkpoint; a run none of whose checkpoints is whole has nothing worth keeping."""
    try:
        return checkpoint.newest(run / "checkpoints")
    except checkpoint.CheckpointError:
        return None


def matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def unsettled(table: Path) -> list[dict]:
    """The items of a table that are neither done, be it with nothing to score, nor barred."""
    ledger, items = Ledger(table / "ledger.jsonl"), json.loads((table / "plan.json").read_text())["items"]
    return [item for item in items if ledger.state(item["name"], item["digest"]) not in ("done", "barred")]


def unpack(archive: Path, table: Path) -> None:
    partial = table.with_name(f".{table.name}.partial")
    with tarfile.open(archive, "r:xz", ignore_zeros=True) as tar:  # one archive after the other
        tar.extractall(partial, filter="data")
    partial.replace(table)


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
