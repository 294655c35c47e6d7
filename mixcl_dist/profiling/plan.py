"""How far a pre-training comes on N GPUs in H hours: a measurement on this machine, and the scaling model beyond it.

As many ranks as this machine has room for, at most N, are measured side by side, each by itself (`mixcl benchmark`), so
that they share memory and disk as they will; a step of a group takes as long as its slowest rank. What they exchange is
measured beside it, by torchrun. Beyond this machine the rates of a network are assumed, and named.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from mixcl_dist.budget import training_cases
from mixcl_dist.config import PRETRAINING, Config, replace, to_dict, to_yaml
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.data_shards.inspection.rate import read_rate
from mixcl_dist.errors import RunError
from mixcl_dist.kernels.distributed import RING_ABOVE
from mixcl_dist.precision import row_dtype
from mixcl_dist.pretraining.pretrain import check_settings, micro_batch_size
from mixcl_dist.profiling.exchange import measured_parts
from mixcl_dist.profiling.result import Result
from mixcl_dist.profiling.scaling import CURES, Contrast, Costs, Network, Step, predict, received_bytes
from mixcl_dist.profiling.step import ONCE, WHOLE
from mixcl_dist.records import Range, RunPlan
from mixcl_dist.run import machine, now

FIFTHS = 5
"""Parts of a measurement whose means say how far a step's time may be off."""
MEASURED_WITHIN, ASSUMED_WITHIN = 1.15, 2.0
"""Factors by which the exchange may be off: among the ranks that were measured, and among others."""
INSIDE_RATE, INSIDE_LATENCY_S = 20e9, 5e-6
"""Assumed between GPUs of a node where two are not at hand, as over PCI Express 4."""
BETWEEN_LATENCY_S = 3e-5
"""Assumed between nodes."""
MATTERS = 0.1
"""Share of a step from which something limits it."""
MIRRORED = {"expected": "expected", "low": "high", "high": "low"}
"""Of what there is more of, the less of the other."""
KEPT_BESIDES = 2
"""Times the weights that a run keeps beside its checkpoints: the network, and the network with its heads."""


@dataclass(frozen=True)
class Cluster:
    """What is planned for."""

    gpus: int
    gpus_per_node: int
    network_gbit: float
    """A second of a node's link to others."""

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)


@dataclass(frozen=True)
class Measured:
    """What was measured here, of `ranks` ranks side by side."""

    ranks: int
    step_s: tuple[float, ...]
    """Of each timed step, the slowest rank's."""
    wait_s: float
    """Of a step, for data."""
    now_and_then_s: Mapping[str, float]
    """Of `step.ONCE`, each time that it is done."""
    exchange_s: Mapping[str, float]
    """See `exchange`."""
    parameters: int
    checkpoint_bytes: float
    peak_bytes: float | None
    read_rate: float
    """Bytes a second, of one thread."""


def plan(config: Config, shards: Path | str, cluster: Cluster, *, hours: float, seconds: float) -> RunPlan:
    """Measure for some `seconds` and predict.

    Raises `ConfigError` where settings, shards and number of GPUs do not fit, before anything is measured; `RunError`
    where a measurement fails.
    """
    manifest = Manifest.load(shards)
    of_a_rank = share_of_a_rank(config, cluster.gpus)
    check_settings(of_a_rank, manifest)
    ranks = min(cluster.gpus, cluster.gpus_per_node, room())
    return predicted(config, manifest, cluster, measure(of_a_rank, shards, ranks, seconds), hours)


def share_of_a_rank(config: Config, ranks: int) -> Config:
    """The settings of one of `ranks` ranks by itself, with its part of the batch."""
    batch = micro_batch_size(config, ranks) * config.engine.accumulation_steps
    return replace(config, {"pretrain.batch_size": batch})


def room() -> int:
    """Ranks that this machine has room for: one on each GPU, or on as many cores as a process has threads."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return max(1, machine().cores // _threads())


def _threads() -> int:
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and int(told) else 1  # as `mixcl launch` has it


def measure(config: Config, shards: Path | str, ranks: int, seconds: float) -> Measured:
    """`config` is that of one rank by itself."""
    with tempfile.TemporaryDirectory(prefix="mixcl-plan-") as folder:
        results = side_by_side(config, shards, ranks, seconds, Path(folder))
    samples = [{name: figure.samples for name, figure in result.figures.items()} for result in results]
    slowest = tuple(max(times) / 1e3 for times in zip(*(of[WHOLE] for of in samples), strict=False))
    first = samples[0]
    parameters = int(first["parameters"][0])
    return Measured(
        ranks=ranks,
        step_s=slowest,
        wait_s=statistics.fmean(statistics.fmean(of["wait"]) for of in samples) / 1e3,
        now_and_then_s={name: max(of[name][0] for of in samples) / 1e3 for name in ONCE if name in first},
        exchange_s=measured_parts(ranks, rows_of(config), config.network.voxel_dim, parameters, _environment()),
        parameters=parameters,
        checkpoint_bytes=first["checkpoint size"][0],
        peak_bytes=max(of["memory"][0] for of in samples) if "memory" in first else None,
        read_rate=read_rate(shards),
    )


def rows_of(config: Config) -> int:
    """Of a rank by itself in a backward pass."""
    return 2 * config.pretrain.batch_size // config.engine.accumulation_steps * config.rows.per_view_pair


def side_by_side(config: Config, shards: Path | str, ranks: int, seconds: float, folder: Path) -> list[Result]:
    """Results of `mixcl benchmark` by as many processes at the same time, each with a GPU where there are any."""
    (folder / "config.yaml").write_text(to_yaml(config))
    outs = [folder / f"{rank}.json" for rank in range(ranks)]
    words = [sys.executable, "-m", "mixcl_dist", "benchmark", "--data", str(shards)]
    words += ["--config", str(folder / "config.yaml"), "--seconds", str(seconds)]
    with _all_ended([_started([*words, "--out", str(out)], rank) for rank, out in enumerate(outs)]) as processes:
        for process, out in zip(processes, outs, strict=True):
            if process.wait():
                said = out.with_suffix(".log").read_text(errors="replace").strip().splitlines()
                problem = (said or ["it said nothing"])[-1].removeprefix("mixcl: ")
                raise RunError(f"a step could not be measured: {problem}")
    return [Result.read(out) for out in outs]


def _started(words: Sequence[str], rank: int) -> subprocess.Popen[bytes]:
    """A process whose last word is a file to write; what it says goes to one beside it, .log."""
    environment = dict(_environment())
    if torch.cuda.is_available():
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[rank] if rank < len(visible) and visible[rank] else str(rank)
    with Path(words[-1]).with_suffix(".log").open("wb") as log:
        return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=log)


@contextmanager
def _all_ended(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    on_cpu = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": str(_threads())}
    return dict(os.environ) | on_cpu


def predicted(config: Config, manifest: Manifest, cluster: Cluster, found: Measured, hours: float) -> RunPlan:
    """Pure, but for the machine's name and the time."""
    step, exchanged = _step(config, manifest, cluster, found)
    step_s = _range_of(config, cluster, found, step)
    batch, patches = config.pretrain.batch_size, _patches(config, manifest)
    steps = Range(**{name: 3600 * hours / getattr(step_s, other) for name, other in MIRRORED.items()})
    mean_s = step_s.expected
    need, there = _memory(config, cluster, found)
    return RunPlan(
        gpus=cluster.gpus,
        nodes=cluster.nodes,
        hours=hours,
        config={section: to_dict(config)[section] for section in PRETRAINING},
        shards=manifest.digest,
        step_s=step_s,
        patches_per_s=scaled(Range(**{name: 1 / getattr(step_s, other) for name, other in MIRRORED.items()}), batch),
        steps=steps,
        samples=scaled(steps, batch),
        epochs=scaled(steps, batch / patches),
        gpu_hours=cluster.gpus * hours,
        asked_hours=scaled(step_s, config.pretrain.steps / 3600),
        parts_s=step._asdict(),
        limit=_limit(step, found, mean_s),
        disk_bytes=config.checkpoint.keep * found.checkpoint_bytes + KEPT_BESIDES * 4 * found.parameters,
        shards_bytes=float(sum(shard.bytes for shard in manifest.shards)),
        read_bytes_per_s=batch * _sample_bytes(manifest) / mean_s,
        exchange_bytes_per_s=exchanged / mean_s,
        memory_bytes=need,
        memory_there_bytes=there,
        measured=_told_measured(config, cluster, found),
        assumed=_told_assumed(config, cluster, found),
        made=now(),
        machine=machine(),
    )


def scaled(range_: Range, factor: float) -> Range:
    return Range(**{name: factor * value for name, value in dataclasses.asdict(range_).items()})


def _step(config: Config, manifest: Manifest, cluster: Cluster, found: Measured) -> tuple[Step, float]:
    """A step by part, and the bytes that a rank gets from others in it."""
    of_a_rank = share_of_a_rank(config, cluster.gpus)
    rows, passes = rows_of(of_a_rank), config.engine.accumulation_steps
    parts, seen = found.exchange_s, max(1, found.ranks - 1)
    others = parts["loss_together"] - parts["loss_alone"] - 2 * parts["gather"]
    costs = Costs(
        compute_s=max(statistics.fmean(found.step_s) - passes * parts["loss_alone"], 0.0),
        own_pair_s=parts["loss_alone"] / rows**2,
        other_pair_s=(max(0.0, others) / seen if found.ranks > 1 else 2 * parts["loss_alone"]) / rows**2,
        parameters=found.parameters,
        width=config.network.voxel_dim,
        element_bytes=row_dtype(torch.device("cuda" if torch.cuda.is_available() else "cpu")).itemsize,
        sample_bytes=_sample_bytes(manifest),
        patches=of_a_rank.pretrain.batch_size,
    )
    design = {"ranks": cluster.gpus, "rows": rows, "stage": config.engine.stage(cluster.gpus), "passes": passes}
    contrast = _contrast(config, cluster.gpus * rows * costs.width * costs.element_bytes)
    step = predict(costs, _network(cluster, found, costs, rows), **design, contrast=contrast)
    return step, received_bytes(costs, **design, contrast=contrast)


def _contrast(config: Config, embeddings_bytes: int) -> Contrast:
    if config.objective.contrast == "rank":
        return "rank"
    return "ring" if embeddings_bytes > RING_ABOVE else "gather"


def _network(cluster: Cluster, found: Measured, costs: Costs, rows: int) -> Network:
    between = cluster.network_gbit * 1e9 / 8 / min(cluster.gpus, cluster.gpus_per_node)
    inside, latency_s = INSIDE_RATE, INSIDE_LATENCY_S
    if found.ranks > 1:
        hops, parts = found.ranks - 1, found.exchange_s
        latency_s = parts["gather_number"] / hops
        block = rows * costs.width * costs.element_bytes
        inside = hops * block / max(parts["gather"] - parts["gather_number"], 1e-9)
    storage = found.read_rate * cluster.gpus
    return Network(
        "", cluster.gpus_per_node, inside, min(between, inside), latency_s, max(BETWEEN_LATENCY_S, latency_s), storage
    )


def _range_of(config: Config, cluster: Cluster, found: Measured, step: Step) -> Range:
    """Seconds of a step with what is done now and then, and how far off they may be."""
    every = {
        "checkpoint": config.checkpoint.every,
        "inspection": config.pretrain.gradient_norms_every,
        "pictures": config.pretrain.sample_every,
    }
    now_and_then = sum(seconds / every[name] for name, seconds in found.now_and_then_s.items() if every[name])
    own = statistics.fmean(found.step_s)
    exchange = max(step.seconds - own, 0.0)
    factor = MEASURED_WITHIN if found.ranks == cluster.gpus else ASSUMED_WITHIN
    low, high = spread_of_fifths(found.step_s)
    return Range(
        expected=own + exchange + now_and_then,
        low=low + exchange / factor + now_and_then,
        high=high + exchange * factor + now_and_then,
    )


def spread_of_fifths(samples: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest mean of fifths that follow each other; of fewer samples the least and greatest."""
    if len(samples) < FIFTHS:
        return min(samples), max(samples)
    edges = [len(samples) * part // FIFTHS for part in range(FIFTHS + 1)]
    means = [statistics.fmean(samples[first:last]) for first, last in pairwise(edges)]
    return min(means), max(means)


def _limit(step: Step, found: Measured, mean_s: float) -> str:
    shares = {name: seconds / mean_s for name, seconds in step._asdict().items() if name not in ("compute", "reading")}
    shares["sweeps"] = max(0.0, shares["sweeps"] - found.exchange_s["loss_alone"] / mean_s)
    shares["data"] = found.wait_s / mean_s
    if step.seconds == step.reading:
        shares["reading"] = 1 - sum(seconds for name, seconds in step._asdict().items() if name != "reading") / mean_s
    most = max(shares, key=shares.__getitem__)
    if shares[most] < MATTERS:
        return "computing: nothing else takes a tenth of a step; mixcl benchmark says which part of it"
    cure = "more data.workers, or a data.cache" if most == "data" else CURES[most]
    return f"{most}, {shares[most]:.0%} of a step: {cure}"


def _patches(config: Config, manifest: Manifest) -> int:
    trained = set(training_cases(manifest.cases, config.budget))
    return sum(case.patches for case in manifest.cases if case.name in trained)


def _sample_bytes(manifest: Manifest) -> float:
    return sum(shard.bytes for shard in manifest.shards) / manifest.patches


def _memory(config: Config, cluster: Cluster, found: Measured) -> tuple[float | None, float | None]:
    """Bytes that a rank needs and has: others' embeddings come to what was measured; what ZeRO saves is left out."""
    if torch.cuda.is_available():
        there = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        there = machine().memory_gb * 2**30 / min(cluster.gpus, cluster.gpus_per_node)
    if found.peak_bytes is None:
        return None, there
    block = rows_of(share_of_a_rank(config, cluster.gpus)) * config.network.voxel_dim * 4
    others = 0 if config.objective.contrast == "rank" else min((cluster.gpus - 1) * block, RING_ABOVE)
    return found.peak_bytes + 2 * others, there


def _told_measured(config: Config, cluster: Cluster, found: Measured) -> tuple[str, ...]:
    low, high = spread_of_fifths(found.step_s)
    by = f"each of {found.ranks} ranks side by side, the slowest" if found.ranks > 1 else "one rank"
    lines = [
        f"{len(found.step_s)} steps of {config.pretrain.batch_size // cluster.gpus} patches by {by}: "
        f"{1e3 * statistics.fmean(found.step_s):.4g} ms ({1e3 * low:.4g} to {1e3 * high:.4g} in fifths), "
        f"{1e3 * found.wait_s:.3g} ms of it waiting for data",
        "now and then: " + ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in found.now_and_then_s.items()),
        f"one thread reads the shards at {found.read_rate / 1e6:.4g} MB/s, which may be from memory",
    ]
    if found.ranks > 1:
        gather, reduce = (1e3 * found.exchange_s[name] for name in ("gather", "reduce"))
        lines.append(f"between these ranks all rows are gathered in {gather:.3g} ms, gradients added in {reduce:.3g}")
    return tuple(lines)


def _told_assumed(config: Config, cluster: Cluster, found: Measured) -> tuple[str, ...]:
    lines = ["nothing else runs on the machines, as nothing else did here"]
    if cluster.gpus > found.ranks:
        lines.append(f"the other {cluster.gpus - found.ranks} ranks are as fast as those measured, and read as fast")
    if cluster.nodes > 1:
        lines.append(f"{cluster.network_gbit:g} Gbit/s between nodes of {cluster.gpus_per_node} (--network-gbit)")
    if found.ranks == 1 and cluster.gpus > 1 and cluster.gpus_per_node > 1:
        lines.append(f"{INSIDE_RATE / 1e9:g} GB/s between GPUs of a node, of which there is one here")
    if config.pretrain.probe_every:
        lines.append("probes take no time (pretrain.probe_every)")
    return tuple(lines)


def told(of: RunPlan) -> str:
    """For a terminal: what was measured, what is assumed, what is predicted and what limits it."""
    asked = of.config["pretrain"]["steps"]
    memory = "not known" if of.memory_bytes is None else f"{of.memory_bytes / 2**30:.3g} GiB"
    if of.memory_there_bytes:
        memory += f" of {of.memory_there_bytes / 2**30:.3g} there are"
    rows = [
        ("a step", _shown(scaled(of.step_s, 1e3), "ms")),
        ("patches", _shown(of.patches_per_s, "a second")),
        (f"in {of.hours:g} h", _shown(of.steps, "steps")),
        ("", _shown(of.samples, "samples")),
        ("", _shown(of.epochs, "epochs")),
        ("", f"{of.gpu_hours:,.4g} GPU-hours"),
        (f"{asked:,} steps", _shown(of.asked_hours, "h") + ", as pretrain.steps has it"),
        ("disk", f"{of.disk_bytes / 1e9:.3g} GB for the run, beside {of.shards_bytes / 1e9:.3g} GB of shards"),
        ("reading", f"{of.read_bytes_per_s / 1e6:.3g} MB/s for all, from where the shards lie"),
        ("exchange", f"{of.exchange_bytes_per_s / 1e6:.3g} MB/s to each GPU, on the average of a step"),
        ("memory", f"{memory}, for each GPU or process"),
    ]
    lines = [f"{of.gpus} GPUs or processes on {of.nodes} machines, for {of.hours:g} h", "", "measured here"]
    lines += [f"  {line}" for line in of.measured]
    lines += ["assumed", *(f"  {line}" for line in of.assumed)]
    lines += ["predicted", *(f"  {name:<16}{value}" for name, value in rows)]
    return "\n".join([*lines, f"limit: {of.limit}"])


def _shown(range_: Range, unit: str) -> str:
    expected, low, high = (_number(value) for value in (range_.expected, range_.low, range_.high))
    return f"{expected} {unit} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
