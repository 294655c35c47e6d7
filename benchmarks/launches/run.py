"""Launches, host waits and memory of a training step, by stage, counted on a CPU: see `count.py` for what they mean.

python benchmarks/launches/run.py             the table, beside the committed one
python benchmarks/launches/run.py --check     exit with 1 where a stage has come to make or take more of any
python benchmarks/launches/run.py --write     commit it to benchmarks/results/launches.csv
python benchmarks/launches/run.py --operators "loss, N = 8,192"    which operators a stage is made of
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels are counted, not run

import torch
from count import LaunchCounter

from mixcl_dist import precision
from mixcl_dist.cluster import engine
from mixcl_dist.config import Config, load
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.finetuning import finetune
from mixcl_dist.kernels import mixed_contrastive_loss
from mixcl_dist.networks import heads
from mixcl_dist.phantom import write_cohort
from mixcl_dist.pretraining import pretrain
from mixcl_dist.pretraining.recorder import Recorder

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "launches.csv"

#: Real depth, as the number of layers decides the number of launches; tiny sizes, as they do not, but for more rows
#: than the loss of a few crops takes.
SETTINGS = {
    "build.patch_size": "20,20,20", "network.filters": "4,4,4,4", "network.voxel_dim": "8", "network.crop_dim": "8",
    "views.size": "16,16,16", "rows.per_view_pair": "32", "pretrain.batch_size": "2", "pretrain.steps": "4",
    "pretrain.log_every": "100", "finetune.patch_size": "16,16,16", "finetune.steps": "4", "finetune.log_every": "100",
    "data.workers": "0", "budget.fraction": "0.5",
}  # fmt: skip
COUNTED_STEP = 3  # the first ones allocate what later ones use again; the last one logs

#: The stages of a pre-training step, and the functions of `pretrain` and methods of the engine that they are.
PRETRAIN_STAGES = {"views": "make_views", "rows": "sample_rows", "objective, forward": "mixcl_loss"}
ENGINE_STAGES = {"network, forward": "__call__", "network and objective, backward": "backward", "optimizer": "step"}
BOOKKEEPING = "bookkeeping"
READING = "reading"  # in main memory on a GPU, too: in no table

LOSS_STAGES = {"loss, N = 8,192": 8_192, "loss, N = 65,536": 65_536, "loss, 16 crops": 16}
PRETRAINING, FINETUNING = "pre-training step", "fine-tuning step"


class Bar(NamedTuple):
    launches: int
    waits: int


BARS = {
    **dict.fromkeys(LOSS_STAGES, Bar(launches=40, waits=0)),
    PRETRAINING: Bar(launches=600, waits=0),
    FINETUNING: Bar(launches=400, waits=0),
}


class Count(NamedTuple):
    stage: str
    launches: int
    waits: int
    bytes: int
    """Of memory newly taken, also where it was given back at once."""
    launches_before: int
    """At commit 0bc0912, before launches were counted at all."""
    waits_before: int


def count(folder: Path) -> LaunchCounter:
    """All stages; `folder` is empty and is left with a phantom's shards and runs."""
    counter = LaunchCounter()
    count_losses(counter)
    config = load(overrides=list(SETTINGS.items()))
    cohort = write_cohort(folder / "cohort", training=2, validation=1, unlabelled=0, size=(24, 24, 24), spacing_mm=14)
    build(cohort[:1], folder / "shards", config.build)
    with (  # as on the GPUs that this stands for
        mock.patch.object(precision, "has_bfloat16", lambda device: True),
        mock.patch.object(heads, "row_dtype", lambda device: torch.bfloat16),
    ):
        count_pretraining(counter, config, folder / "shards", folder / "pretraining")
        count_finetuning(counter, config, cohort[0], folder / "finetuning")
    return counter


def count_losses(counter: LaunchCounter) -> None:
    """Forward and backward of the loss alone: voxel rows of 128 features with 14 candidate sets, and 16 crops."""
    for stage, rows in LOSS_STAGES.items():
        crops = rows < 100
        embeddings = torch.empty(rows, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
        numbers = [torch.empty(rows, dtype=torch.int64, device="meta") for _ in range(2)]
        table = torch.empty((1, 2) if crops else (14, 12), dtype=torch.bool, device="meta")
        # Autocast does not know meta tensors, and the loss only switches it off.
        no_autocast = mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext())
        with no_autocast, counter, counter.stage(stage):
            mixed_contrastive_loss(embeddings, *numbers, table, label_weight=1.0 - crops).loss.backward()


def count_pretraining(counter: LaunchCounter, config: Config, shards: Path, run: Path) -> None:
    """One step between two logs, through the engine that trains."""
    with (
        _staged(counter, pretrain, PRETRAIN_STAGES),
        _staged(counter, engine._DeepSpeed, ENGINE_STAGES),
        mock.patch.object(pretrain, "progress", _counting(counter)),
        mock.patch.object(Recorder, "waiting", lambda recorder: counter.stage(READING)),
        counter.stage(BOOKKEEPING),
    ):
        pretrain.pretrain(config, shards=shards, run=run)


def count_finetuning(counter: LaunchCounter, config: Config, data: Path, run: Path) -> None:
    with mock.patch.object(finetune, "progress", _counting(counter)), counter.stage(FINETUNING):
        finetune.finetune(config, data=data, start=None, run=run)


def _counting(counter: LaunchCounter) -> Callable[..., Iterator[Any]]:
    """A stand-in for `progress` under which one of the training's steps is counted."""

    def progress(items: Iterable[Any], *, unit: str, **_: Any) -> Iterator[Any]:
        for item in items:
            with counter if (unit, item) == ("step", COUNTED_STEP) else nullcontext():
                yield item

    return progress


def _staged(counter: LaunchCounter, owner: Any, stages: dict[str, str]) -> AbstractContextManager:
    """A block in which functions of a module or class count for their stages."""

    def staged(stage: str, function: Callable) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with counter.stage(stage):
                return function(*args, **kwargs)

        return counted

    return mock.patch.multiple(owner, **{name: staged(stage, getattr(owner, name)) for stage, name in stages.items()})


def table(counter: LaunchCounter) -> list[Count]:
    """A line for each stage, and for the steps as wholes."""
    before = read_committed()
    parts = {stage: (stage,) for stage in (*LOSS_STAGES, *PRETRAIN_STAGES, *ENGINE_STAGES, BOOKKEEPING)}
    step = [stage for stage in parts if stage not in LOSS_STAGES]
    made_of = parts | {PRETRAINING: step, FINETUNING: (FINETUNING,)}
    counts = []
    for stage, names in made_of.items():
        now = counter.total(*names)
        counts.append(Count(stage, *now, *(before[stage][4:] if stage in before else now[:2])))
    return counts


def read_committed() -> dict[str, Count]:
    if not COMMITTED.exists():
        return {}
    with COMMITTED.open() as file:
        rows = [Count(stage, *map(int, numbers)) for stage, *numbers in list(csv.reader(file))[1:]]
    return {row.stage: row for row in rows}


def write_table(counts: list[Count], path: Path) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Count._fields, *counts])


def grown(counts: list[Count]) -> list[Count]:
    """Stages that make more launches or waits, or take more memory, than the committed table says."""
    committed = read_committed()
    return [
        now
        for now in counts
        if now.launches > (most := committed[now.stage]).launches or now.waits > most.waits or now.bytes > most.bytes
    ]


def verdict(count: Count) -> str:
    bar = BARS.get(count.stage)
    if bar is None:
        return ""
    met = count.launches <= bar.launches and count.waits <= bar.waits
    return f"{'met' if met else 'MISSED'}: at most {bar.launches} launches, {bar.waits} waits"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {COMMITTED.relative_to(ROOT)}")
    parser.add_argument(
        "--check", action="store_true", help="fail where a stage makes more than the committed table says"
    )
    parser.add_argument("--operators", metavar="STAGE", help="list the operators of a stage instead")
    parser.add_argument("--out", type=Path, help="folder that gets the table, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counter = count(Path(folder))
    if options.operators:
        for kind, found in (("launches", counter.launches), ("waits", counter.waits), ("bytes", counter.bytes)):
            for (stage, operator), number in found.most_common():
                if stage == options.operators and number:
                    print(f"{number:>12,} {kind:<9} {operator}")
        return 0
    counts = table(counter)
    print(f"{'stage':<34} {'launches':>9} {'waits':>6} {'bytes':>14} {'before':>15}")
    for row in counts:
        before = f"{row.launches_before:>9} {row.waits_before:>5}"
        print(f"{row.stage:<34} {row.launches:>9} {row.waits:>6} {row.bytes:>14,} {before} {verdict(row)}".rstrip())
    more = grown(counts)
    for row in more if options.check else ():
        print(f"{row.stage}: more than committed; see --operators '{row.stage}', or commit it with --write")
    if options.write:
        write_table(counts, COMMITTED)
    if options.out:
        write_table(counts, options.out / COMMITTED.name)
    return int(options.check and bool(more))


if __name__ == "__main__":
    sys.exit(main())
