"""A pre-training step on this machine, on one's own shards: where its time goes, beside the least it can take.

The product's own `pretrain` runs, and each of its parts is timed without those inside it; on a GPU each part is waited
for, so that their sum is a little more than a step takes. `checkpoint` is what the last step waits for the state's
copy, `inspection` and `pictures` what the last step leaves for people; they count to no other step. Then the same is
run with one batch over and over: the difference is what the loader costs. `decode` is the loader alone, in this
process, a batch; it runs beside the step where there are `data.workers`. One rank exchanges nothing.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from torch.utils.benchmark import timer

from mixcl_dist.cluster import checkpoint
from mixcl_dist.cluster.group import described
from mixcl_dist.config import Config, replace
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.data_shards.streaming.stream import Batch, PatchStream
from mixcl_dist.errors import RunError
from mixcl_dist.pretraining.pretrain import Watch, pretrain
from mixcl_dist.profiling import floors
from mixcl_dist.profiling.result import Figure, Result, ended, environment
from mixcl_dist.records import PretrainRecord
from mixcl_dist.trackers import told_settings

WARM = 2  #: steps, which allocate what later ones use again
LEAST, MOST = 3, 2000  #: steps that are timed
TRACED = 10
DECODED = 4  #: batches
TWIN_SHARE = 0.25
"""Of the seconds, for the run with one batch."""
BENCHMARK = "step"
WHOLE, TWIN, REST = "step", "step with one batch over and over", "the rest"
ONCE = ("checkpoint", "inspection", "pictures")
"""Parts of the last step alone."""
FLOOR_OF = {"forward": "network"}
"""Part → its name in `floors`, where it is another."""
CURES = {
    "wait": "data.workers",
    "views": "views.size",
    "rows": "rows.per_view_pair",
    "forward": "network.filters or views.size",
    "loss": "rows.per_view_pair",
    "backward": "network.filters, views.size or rows.per_view_pair",
    "optimizer": "engine.accumulation_steps",
    REST: "pretrain.log_every",
}
"""Part → what changes it."""


@dataclass(frozen=True)
class Profile:
    """What was measured; times in ms."""

    parts: dict[str, list[float]]
    """Of each timed step: the whole, and its parts."""
    once: dict[str, float]
    """`ONCE`, of the last step."""
    twin: list[float]
    decode: list[float]
    """Of one core, of each of some batches."""
    floors: dict[str, float]
    flop_ms: float
    """What a step's FLOP would take at the rate of a matmul."""
    parameters: int
    checkpoint_bytes: int
    peak_bytes: int | None
    """Of a GPU's memory, or of this process where there is none; None where the system does not say."""

    def figures(self, config: Config) -> dict[str, Figure]:
        """As a result has them."""
        steps = self.parts[WHOLE]
        times = {**self.parts, TWIN: self.twin, "decode": self.decode}
        times |= {name: [ms] for name, ms in self.once.items()}
        times |= {f"{name}, floor": [ms] for name, ms in self.floors.items()}
        found = {name: Figure(unit="ms", better="less", samples=tuple(samples)) for name, samples in times.items()}
        rates, shares = ([factor / ms for ms in steps] for factor in (1e3 * config.pretrain.batch_size, self.flop_ms))
        found["patches"] = Figure(unit="patches/s", better="more", samples=tuple(rates))
        found["matmul rate"] = Figure(unit="of it used", better="more", samples=tuple(shares))
        sizes = {"parameters": self.parameters, "checkpoint size": self.checkpoint_bytes}
        for name, size in sizes.items():
            unit = "bytes" if name == "checkpoint size" else "numbers"
            found[name] = Figure(unit=unit, better="less", samples=(float(size),), exact=True)
        if self.peak_bytes:
            found["memory"] = Figure(unit="bytes", better="less", samples=(float(self.peak_bytes),))
        return found

    def said(self, config: Config) -> str:
        """What is lost most, and what changes it."""
        medians = {name: statistics.median(times) for name, times in self.parts.items()}
        losses = {name: medians[name] - self.floors.get(name, 0.0) for name in CURES if name in medians}
        most = max(losses, key=losses.__getitem__)
        step, twin = medians[WHOLE], statistics.median(self.twin)
        return (
            f"Most is lost in {most}: {max(losses[most], 0):.1f} of {step:.1f} ms a step are beyond its floor; "
            f"{CURES[most]} changes it. With one batch over and over a step takes {twin:.1f} ms, so the loader costs "
            f"{max(step - twin, 0) / step:.0%}; it needs {statistics.median(self.decode):.1f} ms of a core a batch, "
            f"and data.workers is {config.data.workers}."
        )


def benchmark(
    config: Config, shards: Path | str, *, seconds: float, trace: Path | None = None, command: Sequence[str] = ()
) -> Result:
    """Measure for some `seconds`, starts not counted; `trace` is a file for what ui.perfetto.dev shows.

    Raises what `pretrain` raises, before anything is measured where settings and shards do not fit.
    """
    if (ranks := described().world_size) > 1:
        raise RunError(f"this is one of {ranks} processes; start mixcl benchmark by itself")
    here = environment()
    found = measure(config, shards, seconds)
    if trace:
        write_trace(config, shards, trace)
    return Result(
        benchmark=BENCHMARK,
        command=tuple(command),
        quick=seconds == 0,
        environment=ended(here),
        conditions={"shards": Manifest.load(shards).digest} | {k: str(v) for k, v in told_settings(config).items()},
        figures=found.figures(config),
        said=found.said(config),
    )


def measure(config: Config, shards: Path | str, seconds: float) -> Profile:
    """Time as many steps as take some `seconds`, and at least three."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        *first, _ = steps_of(config, shards, folder / "first", LEAST)
        step_s = statistics.median(step[WHOLE] for step in first) / 1e3
        count = min(MOST, max(LEAST, int(seconds * (1 - TWIN_SHARE) / step_s)))
        *real, last = steps_of(config, shards, folder / "real", count)
        peak_bytes = _peak_bytes()  # of what a run needs: the network is measured in other ways below
        twins = max(LEAST, int(count * TWIN_SHARE))
        *twin, _ = steps_of(config, shards, folder / "twin", twins, lambda stream: repeat(next(iter(stream))))
        record, newest = PretrainRecord.load(folder / "real"), checkpoint.newest(folder / "real" / "checkpoints")
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) if newest else 0
    works, rates = floors.floors(config), floors.measured_rates(_device())
    names = {theirs: ours for ours, theirs in FLOOR_OF.items()}
    return Profile(
        parts={name: [step.get(name, 0.0) for step in real] for name in real[0]},
        once={name: last[name] for name in ONCE if name in last},
        twin=[step[WHOLE] for step in twin],
        decode=decoding_alone(config, shards),
        floors={names.get(part, part): 1e3 * work.seconds(rates) for part, work in works.items()},
        flop_ms=1e3 * sum(work.flop for work in works.values()) / rates.flop,
        parameters=record.parameters,
        checkpoint_bytes=size,
        peak_bytes=peak_bytes,
    )


def steps_of(
    config: Config,
    shards: Path | str,
    run: Path,
    count: int,
    batches: Callable[[Iterable[Batch]], Iterator[Batch]] = iter,
    each: Callable[[], object] = lambda: None,
) -> list[dict[str, float]]:
    """ms of the parts of `count` steps, and of the last one, which saves and draws; `each` is called after every step,
    the first ones too."""
    clock = _Clock(each)
    pretrain(_to_be_timed(config, count), shards=shards, run=run, watch=Watch(clock.part, batches))
    return clock.steps[WARM:]


def _to_be_timed(config: Config, count: int) -> Config:
    """All that is done now and then is done in the last step alone."""
    last = WARM + count + 1
    settings: dict[str, int | None] = {"pretrain.steps": last, "pretrain.max_hours": None, "pretrain.probe_every": 0}
    settings |= {"checkpoint.every": last, "pretrain.sample_every": last}
    return replace(
        config, settings | {"pretrain.gradient_norms_every": last * bool(config.pretrain.gradient_norms_every)}
    )


class _Clock:
    """Times the parts of each step, in ms, a part without those inside it."""

    def __init__(self, each: Callable[[], object]) -> None:
        self.steps: list[dict[str, float]] = []
        self._each = each
        self._inside: list[float] = []
        self._now: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._inside.append(0.0)
        begin = timer()  # which waits for a GPU
        with record_function(f"mixcl/{name}"):
            yield
            end = timer()
        took = 1e3 * (end - begin)
        own = took - self._inside.pop()
        if self._inside:
            self._inside[-1] += took
        self._now[name] += own
        if name == WHOLE:
            self.steps.append({**self._now, WHOLE: took, REST: own})
            self._now.clear()
            self._each()


def write_trace(config: Config, shards: Path | str, file: Path) -> None:
    """Some steps more, as a Chrome trace with the parts as named ranges and every allocation."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    active = schedule(wait=WARM - 1, warmup=1, active=TRACED, repeat=1)
    with (
        tempfile.TemporaryDirectory() as folder,
        profile(activities=activities, schedule=active, profile_memory=True) as traced,
    ):
        steps_of(config, shards, Path(folder) / "run", TRACED, each=traced.step)
    traced.export_chrome_trace(str(file))


def decoding_alone(config: Config, shards: Path | str) -> list[float]:
    """ms of this thread for each of some batches: read, verified and decoded, and nothing else."""
    stream = PatchStream(shards, batch_size=config.pretrain.batch_size, seed=0, workers=0, label_cases=set())
    batches, times = iter(stream), [time.thread_time()]
    for _ in range(DECODED + 1):
        next(batches)
        times.append(time.thread_time())
    return [1e3 * (end - begin) for begin, end in pairwise(times)][1:]


def table(result: Result) -> str:
    """The times of a result of this benchmark, as lines for a terminal."""
    times = {name: one.samples for name, one in result.figures.items() if one.unit == "ms"}
    lines = [f"{'part':<36}{'ms':>9}{'least':>9}{'most':>9}{'floor':>9}"]
    for name, samples in times.items():
        if not name.endswith(", floor"):
            floor = f"{times[f'{name}, floor'][0]:>9.2f}" if f"{name}, floor" in times else ""
            lines.append(f"{name:<36}{statistics.median(samples):>9.2f}{min(samples):>9.2f}{max(samples):>9.2f}{floor}")
    rate = statistics.median(result.figures["patches"].samples)
    used = statistics.median(result.figures["matmul rate"].samples)
    return "\n".join([*lines, f"{rate:.3g} patches/s; {used:.1%} of the matmul rate is used"])


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _peak_bytes() -> int | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if not sys.platform.startswith("linux"):
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
