"""What there is to measure: five stages of jobs, each job a program that measures some items.

An item's name begins with its stage, `tiles/forward-bf16-128`. Limits are what an H100 should stay well within.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

KERNELS = ("kernels/*.py",)
GATE = (*KERNELS, "benchmarks/kernel/gate.py", "benchmarks/kernel/inputs.py", "benchmarks/gpu/check.py")
PRODUCT = (*KERNELS, "mixcl_dist/**/*.py", "mixcl_dist/recipes/*.yaml", "cluster/*.py", "data_shards/**/*.py")
SWEPT_KERNELS, SWEPT_WIDTHS = ("forward", "backward", "forward-triangle"), (128, 64, 256)
STEPS, TINY_STEPS = ("48", "96", "96-compile"), ("16",)  #: edges of views, and a variant of the step
TINY_WIDTH, PATIENCE = 256, 6
SIDE_BY_SIDE = 16  #: jobs of a wave, and items of the few-label table
KEPT_TABLE = "few_label.tar.xz"  #: what is kept of the few-label table, beside the ledger


@dataclass(frozen=True)
class Job:
    """A program in this folder and the items that it measures, one after the other."""

    program: str
    items: tuple[str, ...]
    limit: float  #: seconds
    sources: tuple[str, ...]  #: files whose content the figures depend on
    barred_by: tuple[str, ...] = ()  #: items that must not have failed
    needs: tuple[str, ...] = ()  #: files in the work folder, made by other jobs
    makes: str = ""  #: such a file; this job is run where one that is run needs it, and it is not there
    wave: int = 0  #: the jobs of a stage's wave run side by side, once the wave before has ended
    launcher: tuple[str, ...] = ()  #: what runs Python


def plan(stage: str, entries: list[str], tiny: bool) -> list[Job]:
    """All jobs of a stage; `entries` names the tuning table's entries for this card, as "bf16-128".

    With `tiny` there are few, and each has as much time as Triton's interpreter may need.
    """
    stages = {"check": _check, "kernel": _kernel, "step": _step, "tiles": _tiles, "table": _table}
    if tiny:
        entries = [entry for entry in entries if int(entry.partition("-")[2]) <= TINY_WIDTH]
    jobs = stages[stage]([f"check/{entry}" for entry in entries], tiny)
    return [replace(job, limit=PATIENCE * job.limit) for job in jobs] if tiny else list(jobs)


NAMES = ("check", "kernel", "step", "tiles", "table")


def _check(entries: list[str], tiny: bool) -> Iterator[Job]:
    yield Job("check.py", tuple(entries), 150, GATE)
    if sanitizer := shutil.which("compute-sanitizer"):
        # Without torch's cache every tensor is an allocation of its own, and what is beyond it is seen.
        launcher = "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--tool", "memcheck", "--error-exitcode", "9"
        yield Job("check.py", ("check/sanitizer",), 90, GATE, launcher=launcher, wave=1)


def _kernel(entries: list[str], tiny: bool) -> Iterator[Job]:
    """The benchmark last, as it takes all the time there is."""
    if shutil.which("ncu"):
        sources = *KERNELS, "benchmarks/gpu/counters.py"
        yield Job("counters.py", ("kernel/counters",), 90, sources, barred_by=tuple(entries))
    sources = *KERNELS, "benchmarks/kernel/*.py", "benchmarks/gpu/kernel.py"
    yield Job("kernel.py", ("kernel/benchmark",), 200, sources, barred_by=tuple(entries), wave=1)


def _step(entries: list[str], tiny: bool) -> Iterator[Job]:
    sources = *PRODUCT, "benchmarks/gpu/step.py"
    steps = TINY_STEPS if tiny else STEPS
    edges = [step.partition("-")[0] for step in steps]
    for wave, (step, edge) in enumerate(zip(steps, edges, strict=True)):
        if edge not in edges[:wave]:
            yield Job("table.py", (f"step/shards-{edge}",), 60, PRODUCT, makes=_shards(edge), wave=2 * wave)
        limit = 200 if "-" in step else 100  # the compiler takes minutes
        yield Job("step.py", (f"step/{step}",), limit, sources, tuple(entries), (_shards(edge),), wave=2 * wave + 1)


def _tiles(entries: list[str], tiny: bool) -> Iterator[Job]:
    sources = *GATE, "benchmarks/gpu/tiles.py", "benchmarks/gpu/prepared.py"
    items = [f"tiles/{kernel}-bf16-{width}" for width in SWEPT_WIDTHS for kernel in SWEPT_KERNELS]
    yield Job("tiles.py", tuple(items[: len(SWEPT_KERNELS)] if tiny else items), 240, sources, barred_by=tuple(entries))


def _table(entries: list[str], tiny: bool) -> Iterator[Job]:
    """One job, which runs as many trials as there is time for, and is partial until all are done."""
    edge = "16" if tiny else "48"
    yield Job("table.py", (f"table/shards-{edge}",), 60, PRODUCT, makes=_shards(edge))
    sources = *PRODUCT, "benchmarks/gpu/table.py"
    yield Job("table.py", ("table/few_label",), 600, sources, tuple(entries), (_shards(edge),), wave=1)


def _shards(edge: str) -> str:
    return f"shards-{edge}/manifest.json"


def command(job: Job, items: list[str], folder: str, arguments: list[str]) -> list[str]:
    """How a job's program is started for some of its items."""
    return [*job.launcher, sys.executable, f"{folder}/{job.program}", *items, *arguments]
