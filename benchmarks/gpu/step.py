"""A pre-training step at a real size: its time as the product logs it, then a profile with a floor beside each part."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from worker import work  # first, as it makes what follows importable

# isort: split
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.benchmark import timer

from mixcl_dist.config import Config, load
from mixcl_dist.pretraining.pretrain import Watch, pretrain
from mixcl_dist.profiling import floors
from mixcl_dist.records import read_metrics

SETTINGS = {
    48: {"pretrain.batch_size": 16, "rows.per_view_pair": 256, "data.workers": 8},  # 8,192 rows, as below
    96: {"pretrain.batch_size": 8, "rows.per_view_pair": 512, "data.workers": 8},
    16: {"pretrain.batch_size": 2, "rows.per_view_pair": 8, "data.workers": 1},  # --tiny
}
VARIANTS = {"": {}, "compile": {"engine.compile": True}}
FILTERS, TINY_FILTERS = [32, 64, 128, 256], [4, 8, 16]
WARM, TIMED, PROFILED = 30, 60, 10  #: steps; of --tiny 1 each
PART, LOSS = "part/", "mixcl_dist::"  #: how labels, and the loss's operators, begin
PARTS = {name: name for name in ("views", "rows", "loss", "backward", "optimizer")} | {"forward": "network"}
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def measure(item: str, options: argparse.Namespace) -> dict:
    name = item.partition("/")[2]
    edge, _, variant = name.partition("-")
    warm, timed, profiled = (1, 1, 1) if options.tiny else (WARM, TIMED, PROFILED)
    steps = warm + timed + profiled + 1  # the last step makes pictures and is left out
    config = settings(int(edge), variant, steps, options.tiny)
    run = options.work / "runs" / f"step-{name}"
    shutil.rmtree(run, ignore_errors=True)
    profiled_steps = ProfiledSteps(warm + timed + 1, profiled)
    pretrain(config, shards=options.work / f"shards-{edge}", run=run, watch=Watch(profiled_steps.part))
    if not variant:  # a compiled step's trace tells less
        profiled_steps.profile.export_chrome_trace(str(options.out / f"step-{name}.json.gz"))
    figures = logged(run, config, warm, warm + timed) | profiled_figures(profiled_steps.profile, profiled)
    return beside_floors(figures, config)


def settings(edge: int, variant: str, steps: int, tiny: bool) -> Config:
    values = {"views.size": [edge] * 3, "network.filters": TINY_FILTERS if tiny else FILTERS}
    values |= {"pretrain.steps": steps, "pretrain.log_every": 1 if tiny else 10, "budget.fraction": 0.05}
    values |= {"pretrain.gradient_norms_every": 0}  # of a plain step
    values |= {"budget.development": []} if tiny else {}  # there are few cases
    values |= SETTINGS[edge] | VARIANTS[variant]
    return load(recipe="few_label", overrides=[(key, str(value)) for key, value in values.items()])


class ProfiledSteps:
    """Profiles `count` steps from the `first` on, with their parts labelled."""

    def __init__(self, first: int, count: int) -> None:
        self.step, self.first, self.last = 0, first, first + count - 1
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.profile = profile(activities=activities)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """As of `Watch`."""
        if name in PARTS:
            with record_function(PART + PARTS[name]):
                yield
        elif name != "step":
            yield
        else:
            self.step += 1
            if self.step == self.first:
                timer()  # waits for the GPU
                self.profile.__enter__()
            yield
            if self.step == self.last:
                timer()
                self.profile.__exit__(None, None, None)


def logged(run: Path, config: Config, first: int, last: int) -> dict:
    """Speed and wait for data, as the product says, over the steps after `first` up to `last`; the most memory."""
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if first < entry["step"] <= last]
    seconds = sum(entry["seconds"] for entry in entries)
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else math.nan
    return {
        "step_ms": 1e3 * seconds / (last - first),
        "samples_per_s": (last - first) * config.pretrain.batch_size / seconds,
        "data_wait": sum(entry["data_wait_share"] * entry["seconds"] for entry in entries) / seconds,
        "memory_gib": memory,
    }


def profiled_figures(prof: profile, steps: int) -> dict:
    """Of one step: ms that the GPU is busy, by part and by kernel; launches and waits; the loss kernels' share."""
    rows, events = prof.key_averages(), prof.events()
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    busy = covered([(event.time_range.start, event.time_range.end) for event in kernels]) / 1e3 / steps
    parts = {
        row.key.removeprefix(PART): row.device_time_total / 1e3 / steps
        for row in rows
        if row.key.startswith(PART) and row.device_type == DeviceType.CPU  # on the device it spans pauses, too
    }
    if busy:  # runs on a thread of its own, under no label: what is left
        parts["backward"] = max(busy - sum(ms for part, ms in parts.items() if part != "backward"), 0)
    loss = sum(event.device_time_total for event in events if is_loss(event)) / 1e3 / steps
    return {
        "busy_ms": busy,
        "parts_ms": parts,
        "loss_share": loss / busy if busy else math.nan,
        "launches": sum(row.count for row in rows if row.key in LAUNCHES) / steps,
        "waits": sum(row.count for row in rows if row.key in WAITS) / steps,
        "kernels_ms": longest(kernels, steps),
    }


def is_loss(event) -> bool:
    """Whether it is one of the loss's operators, and not called by another of them."""
    names = [event.name, event.cpu_parent.name if event.cpu_parent else ""]
    return event.device_type == DeviceType.CPU and [name.startswith(LOSS) for name in names] == [True, False]


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return total


def longest(kernels: list, steps: int, most: int = 20) -> dict[str, float]:
    times: dict[str, float] = {}
    for event in kernels:
        times[event.name[:90]] = times.get(event.name[:90], 0.0) + event.time_range.elapsed_us() / 1e3 / steps
    return dict(sorted(times.items(), key=lambda pair: -pair[1])[:most])


def beside_floors(figures: dict, config: Config) -> dict:
    """Add the card's rates, the floor of each part in ms, the share of the matmul rate, and a line for people."""
    head = f"{figures['step_ms']:.1f} ms a step of {config.pretrain.batch_size} patches"
    head += f", data wait {figures['data_wait']:.1%}"
    works = floors.floors(config)
    flop = sum(work.flop for work in works.values())
    if not torch.cuda.is_available():
        return {"step_ms": figures["step_ms"], "teraflop": flop / 1e12, "text": f"{head}, no GPU to compare with"}
    torch.cuda.empty_cache()
    device = torch.device("cuda")
    rates = floors.measured_rates(device)
    floor = {part: 1e3 * work.seconds(rates) for part, work in works.items()}
    figures |= {"floors_ms": floor, "teraflop": flop / 1e12, "matmul_teraflops": rates.flop / 1e12}
    figures |= {"bandwidth_tb": rates.bandwidth / 1e12, "mfu": flop / rates.flop / figures["step_ms"] * 1e3}
    parts = [f"{part} {ms:.3g} (floor {floor.get(part, 0):.3g})" for part, ms in figures["parts_ms"].items()]
    text = (
        f"{head}, GPU busy {figures['busy_ms'] / figures['step_ms']:.0%}, MFU {figures['mfu']:.1%}, "
        f"loss {figures['loss_share']:.1%}, {figures['launches']:.0f} launches, {figures['waits']:.0f} waits, "
        f"{figures['memory_gib']:.1f} GiB; ms by part: {', '.join(parts)}"
    )
    return figures | {"text": text}


if __name__ == "__main__":
    work(__doc__, measure)
