"""The whole path on a phantom cohort: volumes → shards → pre-training → few-label trials → report."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

from mixcl_dist.config import Config, to_yaml
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.errors import RunError
from mixcl_dist.jsonfiles import write_atomic
from mixcl_dist.networks.architectures import check_size
from mixcl_dist.phantom import write_cohort
from mixcl_dist.pretraining.pretrain import check_sizes
from mixcl_dist.progress import ProgressReport, progress
from mixcl_dist.records import read_metrics
from mixcl_dist.report import study_table, write_report
from mixcl_dist.run import machine
from mixcl_dist.studies.study import run_study
from mixcl_dist.studies.table import programs

TRAINING, VALIDATION, UNLABELLED = 20, 4, 24
ENVIRONMENT = {
    # Of glibc, which reads them as a process starts: the buffers of a training step are kept for the next one.
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "RAY_worker_niceness": "0",  # else the trials would give way to all else that the machine does
}
"""Makes training on a CPU up to twice as fast."""
LOOK_EVERY_S = 0.5


def demo(config: Config, out: Path) -> None:
    """Run every stage in the folder `out`, print the Dice table, what was found, and where the report is."""
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out}: is not empty; give another --out, or remove it")
    check_sizes(config, config.build.patch_size)
    check_size("finetune.patch_size", config.network, config.finetune.patch_size)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with _stage(1, f"phantom CT: {TRAINING} patients labelled in part, {UNLABELLED} not, {VALIDATION} to be judged by"):
        sources = write_cohort(out / "ct", training=TRAINING, validation=VALIDATION, unlabelled=UNLABELLED)
    with _stage(2, "shards of patches"):
        build(sources, out / "shards", config.build, ProgressReport("build"))
    write_atomic(out / "config.yaml", to_yaml(config).encode())
    starts = {seed: out / f"pretrained-s{seed}" for seed in config.study.seeds}
    with _stage(3, f"pre-training, {len(starts)} times with labels of other patients, {config.pretrain.steps} steps"):
        _pretrain(out / "config.yaml", out / "shards", starts, total=config.pretrain.steps * len(starts))
    with _stage(4, f"few-label trials, pre-trained and from scratch, {config.finetune.steps} steps each"):
        run_study(config, data=sources[0], starts=list(starts.values()), study=out / "study")
    with _stage(5, "report"):
        page = write_report(out / "study")
    print(study_table(out / "study"))
    print(f"{json.loads(page.with_name('report.json').read_text())['headline'][0]} Report: {page.resolve()}")


@contextmanager
def _stage(number: int, title: str) -> Iterator[None]:
    print(f"[{number}/5] {title}", file=sys.stderr, flush=True)
    start = time.monotonic()
    yield
    print(f"[{number}/5] done in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _pretrain(config: Path, shards: Path, starts: Mapping[int, Path], *, total: int) -> None:
    """`mixcl pretrain` for each subset seed, side by side: two runs of one thread are faster than one of two."""
    threads = max(1, machine().cores // len(starts))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "mixcl_dist", "pretrain", "--config", str(config), "--data", str(shards)]
    running: dict[Path, Popen] = {}
    try:
        for seed, run in starts.items():
            with run.with_suffix(".log").open("w") as log:
                arguments = ["--run", str(run), "--budget.seed", str(seed)]
                running[run] = programs.start([*command, *arguments], environment=environment, output=log)
        steps = _steps(running)
        next(steps, None)  # the rate is that of learning, not of starting
        for _ in progress(steps, total=total, initial=1, desc="pretrain", unit="step"):
            pass
    finally:
        for process in running.values():
            programs.kill(process)
    for run, process in running.items():
        if process.wait():
            raise RunError(f"{run}: {programs.last_line(run.with_suffix('.log')) or 'ended without a word'}")


def _steps(running: Mapping[Path, Popen]) -> Iterator[None]:
    """One item for each step that the runs have logged, until all have ended."""
    seen = 0
    while True:
        ended = all(process.poll() is not None for process in running.values())
        logged = [read_metrics(log) for run in running if (log := run / "metrics.jsonl").exists()]
        done = sum(int(metrics[-1]["step"]) for metrics in logged if metrics)
        yield from [None] * (done - seen)
        seen = done
        if ended:
            return
        time.sleep(LOOK_EVERY_S)
