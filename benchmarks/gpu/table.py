"""The few-label table by the product's own commands: shards, one pre-training for each seed, and trials beside it."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from worker import work  # first, as it makes what follows importable

# isort: split
from mixcl_dist import cli
from mixcl_dist.run import read_metrics

SPACING = "4.0,4.0,2.5"  #: mm, as the recipe's shards have it; trials from scratch have no shards to take it from
MARGIN = {16: 24, 48: 64, 96: 112}  #: edge of a patch that views of an edge are drawn from
#: With `--tiny`: of everything as little as runs at all.
TINY_NETWORK = ["--network.filters", "4,8,16", "--network.voxel_dim", "16"]
TINY_VIEWS = ["--views.size", "16,16,16", "--rows.per_view_pair", "8", "--pretrain.batch_size", "2"]
TINY_TRIAL = [*TINY_NETWORK, "--finetune.steps", "2", "--finetune.patch_size", "16,16,16", "--finetune.batch_size", "1"]
TINY_CASES = {"training": 6, "validation": 1}


def measure(item: str, options: argparse.Namespace) -> dict:
    kind, *rest = item.partition("/")[2].split("-")
    measures = {"shards": build_shards, "pretraining": pretrain, "scratch": trial, "pretrained": trial}
    return measures[kind](item.partition("/")[2], options, *rest)


def build_shards(name: str, options: argparse.Namespace, edge: str) -> dict:
    """Shards for views of an edge; `name` is their folder's, too."""
    patch = ",".join([str(MARGIN[int(edge)])] * 3)
    workers = str(len(os.sched_getaffinity(0)))
    settings = ["--recipe", "openkbp", "--build.patch_size", patch, "--build.workers", workers]
    mixcl("shards", "build", str(cases(options)), "--out", str(options.work / name), *settings)
    return {"text": f"patches of {MARGIN[int(edge)]}³"}


def pretrain(name: str, options: argparse.Namespace, seed: str) -> dict:
    run = options.work / "runs" / f"pretrained-{seed}"
    steps = 2 if options.tiny else 2000
    settings = ["--recipe", "openkbp", "--budget.seed", seed[1:], "--pretrain.steps", str(steps)]
    settings += [*TINY_NETWORK, *TINY_VIEWS] if options.tiny else ["--views.size", "48,48,48"]
    resume = ["--resume", "latest"] if (run / "run.json").exists() else []
    shards = options.work / f"shards-{16 if options.tiny else 48}"
    mixcl("pretrain", "--data", str(shards), "--run", str(run), *resume, *settings)
    last = read_metrics(run / "metrics.jsonl")[-1]
    return {"text": f"{steps} steps, loss {last['loss']:.3f}, {last['samples_per_s']:.0f} samples/s at the end"}


def trial(name: str, options: argparse.Namespace, fraction: str, seed: str) -> dict:
    start = str(options.work / "runs" / f"pretrained-{seed}") if name.startswith("pretrained") else "none"
    run = options.work / "runs" / name
    data = ["--data", str(cases(options)), "--from", start, "--labels", fraction, "--seed", seed[1:], "--run", str(run)]
    settings = ["--recipe", "openkbp", "--finetune.spacing_mm", SPACING, *(TINY_TRIAL if options.tiny else [])]
    if not (run / "dice.json").exists():  # written last
        mixcl("finetune", *data, *settings)
    dice = json.loads((run / "dice.json").read_text())
    return {"dice": dice["mean"], "classes": dice["class_mean"], "text": f"mean Dice {100 * dice['mean']:.1f}"}


def cases(options: argparse.Namespace) -> Path:
    """The list of cases; with `--tiny` a list of a few."""
    whole = options.work / "ct" / "dataset.json"
    if not options.tiny:
        return whole
    listed = json.loads(whole.read_text())
    few = whole.with_name("few.json")
    few.write_text(json.dumps(listed | {split: listed[split][:count] for split, count in TINY_CASES.items()}))
    return few


def mixcl(*words: str) -> None:
    if code := cli.main(list(words)):
        raise SystemExit(code)


if __name__ == "__main__":
    work(__doc__, measure)
