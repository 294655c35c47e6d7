"""What several ranks, the engine and checkpoints cost a pre-training, on this machine.

    python benchmarks/ranks/run.py --out OUT               two cores that nothing else uses, some ten minutes
    python benchmarks/ranks/run.py --out OUT --only stall  one of: stall, engine, ranks
    python benchmarks/ranks/run.py --out OUT --quick       small sizes: does everything work here?

What is compared takes turns, another one first each time, and ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR

from mixcl_dist.cluster.checkpoint import Writer
from mixcl_dist.cluster.engine import Engine, EngineConfig, launch
from mixcl_dist.cluster.group import leave
from mixcl_dist.config import Config, load
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.streaming.stream import PatchStream
from mixcl_dist.networks.heads import PretrainNetwork
from mixcl_dist.phantom import write_cohort
from mixcl_dist.pretraining.draws import Draws
from mixcl_dist.pretraining.objective import mixcl_loss
from mixcl_dist.pretraining.rows import sample_rows
from mixcl_dist.pretraining.views import make_views
from mixcl_dist.records import METRICS, read_metrics
from mixcl_dist.run import machine

SETTINGS = {
    "build.patch_size": "40,40,40", "pretrain.batch_size": "8", "pretrain.log_every": "1", "pretrain.steps": "12",
    "pretrain.sample_every": "1000", "pretrain.gradient_norms_every": "0", "checkpoint.every": "1000",
    "data.workers": "0", "budget.fraction": "0.5",
}  # fmt: skip
QUICK = {"network.filters": "4,6,8", "views.size": "16,16,16", "pretrain.batch_size": "4", "pretrain.steps": "4"}
LARGE = {"network.filters": "32,64,128,256", "views.size": "16,16,16", "pretrain.batch_size": "4"}
"""Some 100 MB of state, of a network that makes its steps quickly."""
STEPS_BESIDE = 4
"""During most of which a checkpoint is written."""
FIRST_STEPS = 2
"""Of a run, which allocate what later ones use again."""


class Figure(NamedTuple):
    name: str
    values: list[float]
    """One of each round."""
    most: float | None = None
    least: float | None = None

    def row(self) -> str:
        low, middle, high = min(self.values), statistics.median(self.values), max(self.values)
        bar = f"≤ {self.most:g}" if self.most else f"≥ {self.least:g}" if self.least else ""
        missed = (self.most and middle > self.most) or (self.least and middle < self.least)
        verdict = f"{bar}: {'missed' if missed else 'met'}" if bar else ""
        return f"| {self.name} | {middle:.3g} | {low:.3g} – {high:.3g} | {len(self.values)} | {verdict} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for ranks.md and ranks.json, and of all runs")
    parser.add_argument("--only", nargs="+", default=["stall", "engine", "ranks"], choices=["stall", "engine", "ranks"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    is_one_of_several = "RANK" in os.environ  # an engine sets it, too
    torch.set_num_threads(1)
    small = QUICK if options.quick else {}
    rounds = 2 if options.quick else options.rounds
    shards = made_shards(options.out)
    figures: list[Figure] = []
    if "stall" in options.only:
        figures += stall(configured(LARGE | small), shards, rounds)
        if is_one_of_several:
            print(json.dumps(figures))
            return 0
        figures += stall_of_ranks(options.out, rounds, 2)
    if "engine" in options.only:
        figures += overhead(configured(small), shards, rounds)
    if "ranks" in options.only:
        figures += ranks(SETTINGS | small, shards, rounds)
    write(figures, options.out)
    return 0


def configured(settings: dict[str, str]) -> Config:
    return load(overrides=list((SETTINGS | settings).items()))


def made_shards(out: Path) -> Path:
    if not (out / "shards" / "manifest.json").exists():
        sources = write_cohort(
            out / "cohort", training=4, validation=2, unlabelled=2, size=(72, 60, 72), spacing_mm=5.0
        )
        build(sources, out / "shards", configured({}).build)
    return out / "shards"


def made_engine(config: Config) -> Engine:
    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)
    schedule = functools.partial(LambdaLR, lr_lambda=lambda step: 1.0)
    size = config.pretrain.batch_size
    return launch(PretrainNetwork(config.network), optimizer, schedule, micro_batch_size=size, config=EngineConfig())


class Inputs(NamedTuple):
    """One batch, as every step here sees it."""

    views: object
    rows: object
    config: Config

    @classmethod
    def of(cls, config: Config, shards: Path) -> Inputs:
        batch_size = config.pretrain.batch_size
        stream = PatchStream(shards, batch_size=batch_size, seed=0, workers=0, label_cases=[])
        batch = next(iter(stream))
        draws = Draws(0, batch.slots)
        views = make_views(batch.image, batch.spacing, config.views, config.network.window_hu, draws)
        where, size = views.patch_from_view, config.views.size
        rows = sample_rows(where, size, batch.label, batch.candidate_bits, config.rows, draws, None)
        return cls(views, rows, config)

    def loss(self, network: Callable) -> torch.Tensor:
        output = network(self.views.image, self.rows.voxel_index)
        return mixcl_loss(output, self.views, self.rows, self.config.objective)[0]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def stall(config: Config, shards: Path, rounds: int) -> list[Figure]:
    """What a save keeps the next step waiting for: a copy in memory, beside copying, writing and verifying it all.

    Of several ranks each calls this and copies its part; rank 0, whose figures count, gets the others' in the whole.
    """
    engine, inputs = made_engine(config), Inputs.of(config, shards)

    def step() -> None:
        engine.backward(inputs.loss(engine))
        engine.step()

    with tempfile.TemporaryDirectory(dir=shards.parent) as folder:
        writer, number = Writer(Path(folder), keep=2), 0

        def save() -> None:
            nonlocal number
            number += 1
            snapshot = engine.snapshot()
            if engine.rank == 0:
                writer.begin(number, state={"step": number}, write=snapshot.write, size=snapshot.size)

        def save_and_wait() -> None:
            save()
            writer.wait()

        for _ in range(3):
            step()
        first = seconds(save)
        writer.wait()
        found: dict[str, list[float]] = {"stall": [], "whole": [], "slower": []}
        for _ in range(rounds):
            engine.barrier()
            found["whole"].append(seconds(save_and_wait))
            engine.barrier()
            alone = statistics.median(seconds(step) for _ in range(STEPS_BESIDE))
            engine.barrier()
            found["stall"].append(seconds(save))
            beside = [seconds(step) for _ in range(STEPS_BESIDE)]
            writer.wait()
            # All that the steps beside it took longer, as a share of what it would have taken without them.
            found["slower"].append(sum(beside) - len(beside) * alone)
        size = engine.snapshot().size / 1e6
        writer.close()
    ranks = engine.world_size
    engine.close()
    shares = [100 * stall / whole for stall, whole in zip(found["stall"], found["whole"], strict=True)]
    slower = [100 * slower / whole for slower, whole in zip(found["slower"], found["whole"], strict=True)]
    whole = statistics.median(found["whole"])
    of = f"{ranks} rank{'s' if ranks > 1 else ''}"
    return [
        Figure(f"{of}: a step waits for a save of {size:.0f} MB, % of a synchronous one", shares, 10),
        Figure(f"{of}: the first one of a run, which allocates, %", [100 * first / whole]),
        Figure(f"{of}: a synchronous save, s", found["whole"]),
        Figure(f"{of}: steps beside it take longer by, % of a synchronous one", slower),
    ]


def stall_of_ranks(out: Path, rounds: int, world_size: int) -> list[Figure]:
    """`stall` in processes of a group: rank 0 prints its figures."""
    command = [sys.executable, __file__, "--out", out, "--only", "stall", "--rounds", rounds]
    process = started(command, world_size, stdout=subprocess.PIPE)
    printed, _ = process.communicate()
    if process.returncode:
        sys.exit(f"the saves failed at {world_size} ranks")
    return [Figure(*fields) for fields in json.loads(printed.splitlines()[-1])]


def started(command: Sequence[object], world_size: int, stdout: int) -> subprocess.Popen:
    """The ranks of a command, as one process whose output is that of rank 0."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    launcher = [sys.executable, *torchrun, "--local-ranks-filter=0", "--no-python", "--"] if world_size > 1 else []
    words = [*launcher, *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=stdout, stderr=subprocess.DEVNULL)


def overhead(config: Config, shards: Path, rounds: int) -> list[Figure]:
    """A step of the engine beside one of a bare PyTorch loop, of the same network and batch."""
    engine, inputs = made_engine(config), Inputs.of(config, shards)
    network = copy.deepcopy(engine.module)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

    def bare() -> None:
        inputs.loss(network).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def ours() -> None:
        engine.backward(inputs.loss(engine))
        engine.step()

    for work in (bare, ours, bare, ours):
        work()
    ratios = []
    for number in range(3 * rounds):
        took = {work: seconds(work) for work in ((bare, ours) if number % 2 else (ours, bare))}
        ratios.append(100 * (took[ours] / took[bare] - 1))
    engine.close()
    return [Figure("the engine takes longer than a bare loop by, %", ratios, 5)]


def ranks(settings: dict[str, str], shards: Path, rounds: int) -> list[Figure]:
    """Runs of `mixcl pretrain` with one core for each process."""
    kinds = {"one": (1, "global"), "global": (2, "global"), "rank": (2, "rank")}
    figures: dict[str, list[float]] = {"faster": [], "contrast": [], "start": []}
    for number in range(rounds):
        order = list(kinds)[number % 3 :] + list(kinds)[: number % 3]
        took = {kind: pretrained(settings, shards, *kinds[kind]) for kind in order}
        figures["faster"].append(took["one"].step_s / took["global"].step_s)
        figures["contrast"].append(100 * (took["global"].step_s / took["rank"].step_s - 1))
        figures["start"].append(took["one"].start_s)
    return [
        Figure("2 ranks make the samples/s of one process, times", figures["faster"], least=1.6),
        Figure("global contrast at 2 ranks, % of a step", figures["contrast"], 10),
        Figure("start to the end of the first step, s", figures["start"], 20),
    ]


class Run(NamedTuple):
    step_s: float
    """Median of all steps but the first ones."""
    start_s: float


def pretrained(settings: dict[str, str], shards: Path, world_size: int, contrast: str) -> Run:
    with tempfile.TemporaryDirectory(dir=shards.parent) as folder:
        metrics = Path(folder) / "run" / METRICS
        options = [
            word for key, value in (settings | {"objective.contrast": contrast}).items() for word in (f"--{key}", value)
        ]
        command = [sys.executable, "-m", "mixcl_dist", "pretrain", "--data", shards, "--run", metrics.parent, *options]
        start = time.perf_counter()
        process = started(command, world_size, stdout=subprocess.DEVNULL)
        while not metrics.exists() and process.poll() is None:
            time.sleep(0.02)
        first = time.perf_counter() - start
        if process.wait():
            sys.exit(f"mixcl pretrain failed at {world_size} ranks")
        steps = [entry["seconds"] for entry in read_metrics(metrics)][FIRST_STEPS:]
    return Run(statistics.median(steps), first)


def write(figures: Sequence[Figure], out: Path) -> None:
    here = machine()
    lines = [
        f"{here.cpu}, {here.cores} cores, {here.memory_gb:g} GB; load before the last figure "
        f"{os.getloadavg()[2]:.1f} over 15 minutes. Median of the rounds, least to greatest.",
        "",
        "| what | median | spread | rounds | bar |",
        "|---|---|---|---|---|",
        *(figure.row() for figure in figures),
    ]
    print("\n".join(lines))
    (out / "ranks.md").write_text("\n".join(lines) + "\n")
    content = {figure.name: [float(f"{value:.4g}") for value in figure.values] for figure in figures}
    (out / "ranks.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    leave(main())
