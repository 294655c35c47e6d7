"""A pre-training step on this machine, on your shards and network: where its time goes, beside the least it can take.

    python benchmarks/step/run.py --out OUT --data SHARDS --config my.yaml --steps 20 --trace OUT/trace.json
    python benchmarks/step/run.py --out OUT --quick                     a phantom's shards and a tiny network

The product's own `pretrain` runs, its parts named and timed, a part without those inside it; on a GPU each part is
waited for, so that their sum is a little more than a step takes. `checkpoint` is what the last step waits for the
state's copy, and counts to no other step. Then the same is run with one batch over and over: the difference is what
the loader costs. `decode` is the loader alone, in this process, a batch; it runs beside the step where there are
`data.workers`. `exchange` between ranks lies within backward and optimizer; one rank has none. The trace
(torch.profiler) opens in ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernel"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

import floors
import timing
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mixcl_dist.cluster import engine
from mixcl_dist.config import Config, load
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.streaming.stream import PatchStream
from mixcl_dist.phantom import write_cohort
from mixcl_dist.pretraining import pretrain as product
from mixcl_dist.pretraining.recorder import Recorder
from mixcl_dist.pretraining.saving import Saver

WARM = 2  #: steps, which allocate what later ones use again
DECODED = 4  #: batches
TWIN = "step with one batch over and over"
TINY = {
    "build.patch_size": "20,20,20", "network.filters": "4,4,4", "network.voxel_dim": "8", "network.crop_dim": "8",
    "views.size": "16,16,16", "rows.per_view_pair": "32", "pretrain.batch_size": "2", "data.workers": "1",
}  # fmt: skip
IN_MODULE = {"make_views": "views", "sample_rows": "rows", "mixcl_loss": "loss"}
IN_ENGINE = {"__call__": "forward", "backward": "backward", "step": "optimizer"}
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
    "the rest": "pretrain.log_every or pretrain.gradient_norms_every",
}
"""Part → what changes it."""


class Parts:
    """Stands in for the product's progress; times the parts of each step, in ms."""

    def __init__(self, trace: profile | None = None) -> None:
        self.steps: list[dict[str, float]] = []
        self._inside: list[float] = []
        self._now: defaultdict[str, float] = defaultdict(float)
        self._trace = trace

    def __call__(self, steps: Iterable[int], **_: object) -> Iterator[int]:
        for number, step in enumerate(steps):
            if self._trace and number == WARM:
                self._trace.__enter__()
            self._now.clear()
            _synchronise()
            begin = time.perf_counter()
            yield step
            _synchronise()
            whole = 1e3 * (time.perf_counter() - begin)
            parts = dict(self._now)
            self.steps.append({"step": whole, **parts, "the rest": whole - sum(parts.values())})
        if self._trace:
            self._trace.__exit__(None, None, None)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._inside.append(0.0)
        begin = time.perf_counter()
        with record_function(f"mixcl/{name}"):
            yield
            _synchronise()
        took = 1e3 * (time.perf_counter() - begin)
        self._now[name] += took - self._inside.pop()
        if self._inside:
            self._inside[-1] += took

    def timed(self, owner: Any, names: dict[str, str]) -> AbstractContextManager:
        """A block in which functions of a module or class are parts."""
        inside = {name: self._within(part, getattr(owner, name)) for name, part in names.items()}
        return mock.patch.multiple(owner, **inside)

    def _within(self, part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        return call


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    options = _parse()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        config, shards = _subject(options, Path(folder))
        decode = decoding_alone(config, shards)
        trace = _profile() if options.trace else None
        real = run(config, shards, Path(folder) / "real", trace)
        twin = run(config, shards, Path(folder) / "twin", same_batch=True)
    if trace:
        trace.export_chrome_trace(str(options.trace))
    *real, last = real
    parts = {name: [step.get(name, 0.0) for step in real] for name in real[0]}
    figures = {
        **parts,
        "checkpoint": [last.get("checkpoint", 0.0)],
        "decode": decode,
        TWIN: [step["step"] for step in twin[:-1]],
    }
    least = floors_ms(config)
    sentence = said(figures, least, config)
    (options.out / "said.txt").write_text(sentence + "\n")
    result = {"parts_ms": figures, "floors_ms": least, "samples_per_s": _rate(parts["step"], config)}
    (options.out / "step.json").write_text(json.dumps(result, indent=1) + "\n")
    show(figures, least)
    print(sentence)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for step.json")
    parser.add_argument("--data", type=Path, metavar="SHARDS")
    parser.add_argument("--config", type=Path, help="YAML of the settings, as `mixcl pretrain` takes it")
    parser.add_argument("--recipe")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="settings")
    parser.add_argument("--steps", type=int, default=20, help=f"that are timed, after {WARM} (%(default)s)")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="leave a Chrome trace of the timed steps")
    parser.add_argument("--quick", action="store_true", help="a phantom and a tiny network, 3 steps")
    options = parser.parse_args()
    if options.data is None and not options.quick:
        parser.error("give --data SHARDS, as `mixcl shards build` makes them, or --quick")
    if options.steps < 1:
        parser.error("--steps has to be at least 1")
    if any("=" not in setting for setting in options.settings):
        parser.error("--set takes section.key=value, as in --set data.workers=4")
    return options


def _subject(options: argparse.Namespace, folder: Path) -> tuple[Config, Path]:
    """The settings and the shards that are measured."""
    steps = 3 if options.quick else options.steps
    given = [tuple(setting.split("=", 1)) for setting in options.settings]
    last = [("pretrain.steps", str(WARM + steps + 1))]  # the last step saves and draws, and is not counted
    tiny = list(TINY.items()) if options.quick and options.data is None else []
    files = [options.config] if options.config else []
    config = load(*files, recipe=options.recipe, overrides=[*tiny, *given, *last])
    if options.data:
        return config, options.data
    cohort = write_cohort(folder / "cohort", training=2, validation=1, unlabelled=0, size=(24, 24, 24), spacing_mm=14)
    build(cohort[:1], folder / "shards", config.build)
    return config, folder / "shards"


def _profile() -> profile:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    return profile(activities=activities, profile_memory=True)


def run(
    config: Config, shards: Path, folder: Path, trace: profile | None = None, same_batch: bool = False
) -> list[dict[str, float]]:
    """ms of the parts of each step that counts."""
    parts = Parts(trace)
    with ExitStack() as stack:
        stack.enter_context(parts.timed(product, IN_MODULE))
        stack.enter_context(parts.timed(engine._DeepSpeed, IN_ENGINE))
        stack.enter_context(parts.timed(Saver, {"save": "checkpoint"}))
        stack.enter_context(mock.patch.object(product, "progress", parts))
        stack.enter_context(mock.patch.object(Recorder, "waiting", lambda recorder: parts.part("wait")))
        one = mock.patch.object(PatchStream, "__iter__", _same_batch(PatchStream.__iter__))
        stack.enter_context(one if same_batch else nullcontext())
        product.pretrain(config, shards=shards, run=folder)
    return parts.steps[WARM:]


def _same_batch(stream: Callable[[PatchStream], Iterator]) -> Callable[[PatchStream], Iterator]:
    return lambda self: repeat(next(stream(self)))


def decoding_alone(config: Config, shards: Path) -> list[float]:
    """ms of this thread for each of some batches: read, verified and decoded, and nothing else."""
    stream = PatchStream(shards, batch_size=config.pretrain.batch_size, seed=0, workers=0, label_cases=set())
    batches, times = iter(stream), [time.thread_time()]
    for _ in range(DECODED + 1):
        next(batches)
        times.append(time.thread_time())
    return [1e3 * (end - begin) for begin, end in pairwise(times)][1:]


def floors_ms(config: Config) -> dict[str, float]:
    """Of each part, by the rates measured here: bytes over a copy's bandwidth, FLOP over a matmul's rate."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stopwatch = timing.Stopwatch(device)
    rate = 1e12 * timing.Matmul(stopwatch, torch.bfloat16 if device.type == "cuda" else torch.float32).teraflops
    bandwidth = floors.bandwidth(device) if device.type == "cuda" else _copied(stopwatch)
    works = floors.floors(config)
    names = {theirs: ours for ours, theirs in FLOOR_OF.items()}
    return {names.get(part, part): 1e3 * work.seconds(rate, bandwidth) for part, work in works.items()}


def _copied(stopwatch: timing.Stopwatch, size: int = 2**27) -> float:
    """Bytes a second, read and written, of a large copy in main memory: the best of some."""
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)

    def work() -> Iterator[None]:
        target.copy_(source)
        yield

    laps = stopwatch.rounds({"copy": work}, 0.5, 10)["copy"]
    return 2 * size / min(ms for (ms,) in laps) * 1e3


def said(figures: dict[str, list[float]], least: dict[str, float], config: Config) -> str:
    """What is lost most, and what changes it."""
    medians = {name: statistics.median(times) for name, times in figures.items()}
    losses = {name: medians[name] - least.get(name, 0.0) for name in CURES if name in medians}
    most = max(losses, key=losses.__getitem__)
    step, twin = medians["step"], medians[TWIN]
    return (
        f"Most is lost in {most}: {max(losses[most], 0):.1f} of {step:.1f} ms a step are beyond its floor; "
        f"{CURES[most]} changes it. With one batch over and over a step takes {twin:.1f} ms, so the loader costs "
        f"{max(step - twin, 0) / step:.0%}; it needs {medians['decode']:.1f} ms of a core a batch, "
        f"with {config.data.workers} workers."
    )


def _rate(steps: list[float], config: Config) -> float:
    return 1e3 * config.pretrain.batch_size / statistics.median(steps)


def show(figures: dict[str, list[float]], least: dict[str, float]) -> None:
    print(f"{'part':<36}{'ms':>9}{'min':>9}{'max':>9}{'floor':>9}")
    for name, times in figures.items():
        median, low, high = timing.spread(times)
        floor = f"{least[name]:>9.2f}" if name in least else ""
        print(f"{name:<36}{median:>9.2f}{low:>9.2f}{high:>9.2f}{floor}")


if __name__ == "__main__":
    main()
