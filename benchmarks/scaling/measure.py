"""What a step and its exchange cost on this machine, and what steps of several ranks really take."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixcl_dist.config import load
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.phantom import write_cohort
from mixcl_dist.profiling.exchange import measured_parts
from mixcl_dist.profiling.scaling import Costs, Network, predict
from mixcl_dist.records import METRICS, PretrainRecord, read_metrics

PATCHES, POINTS, WIDTH, STEPS, LOG_EVERY = 2, 512, 32, 60, 5
ROWS = 2 * PATCHES * POINTS
SETTINGS = {
    "network.filters": "8,16,32", "network.voxel_dim": WIDTH, "views.size": "24,24,24", "rows.per_view_pair": POINTS,
    "rows.min_spacing": 1, "objective.crop_identity": 0, "data.workers": 0, "pretrain.steps": STEPS,
    "pretrain.log_every": LOG_EVERY, "pretrain.gradient_norms_every": 0, "pretrain.sample_every": 10**6,
    "checkpoint.every": 10**6, "engine.zero_stage": 1,
}  # fmt: skip
PRETRAIN = [sys.executable, "-m", "mixcl_dist"]


@dataclass(frozen=True)
class Check:
    """A step of some ranks here."""

    ranks: int
    compute_s: float
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


def checks(folder: Path, counts: Sequence[int], rounds: int = 3) -> list[Check]:
    """Predicted and measured steps, the median of some rounds in which both are measured in turns."""
    make_shards(folder)
    found: dict[int, list[Check]] = {ranks: [] for ranks in counts}
    for number in range(rounds):
        for ranks in counts:
            found[ranks].append(check(folder, ranks, f"{number}-{ranks}"))
    return [
        Check(
            ranks,
            *(statistics.median(getattr(one, name) for one in of) for name in Check.__annotations__ if name != "ranks"),
        )
        for ranks, of in found.items()
    ]


def check(folder: Path, ranks: int, name: str) -> Check:
    """A step of `ranks` ranks, predicted from as many processes that know nothing of each other, and measured."""
    alone, parameters = steps_alone(folder, ranks, name)
    parts = measured_parts(ranks, ROWS, WIDTH, parameters, _environment())
    others = parts["loss_together"] - parts["loss_alone"] - 2 * parts["gather"]
    costs = Costs(
        compute_s=alone - parts["loss_alone"],
        own_pair_s=parts["loss_alone"] / ROWS**2,
        other_pair_s=max(0.0, others) / max(1, ranks - 1) / ROWS**2,
        parameters=parameters,
        width=WIDTH,
        element_bytes=4,
        sample_bytes=0,  # in the page cache
        patches=PATCHES,
    )
    hops = max(1, ranks - 1)
    hop_s = parts["gather_number"] / hops
    rate = hops * ROWS * WIDTH * 4 / max(parts["gather"] - parts["gather_number"], 1e-9)
    here = Network("here", ranks, rate, rate, hop_s, hop_s, storage=1e12)
    predicted = predict(costs, here, ranks=ranks, rows=ROWS, stage=1, contrast="gather").seconds
    return Check(ranks, costs.compute_s, predicted, step_together(folder, ranks, name))


def make_shards(folder: Path) -> None:
    cohort = write_cohort(folder / "cohort", training=4, validation=0, unlabelled=4, size=(48, 40, 48), spacing_mm=8.0)
    build(cohort, folder / "shards", load(overrides=[("build.patch_size", "32,32,32")]).build)


def steps_alone(folder: Path, processes: int, name: str) -> tuple[float, int]:
    """Seconds of a step of one of some processes side by side, each a run of its own; and the network's parameters."""
    runs = [folder / f"alone-{name}-{number}" for number in range(processes)]
    started = [
        subprocess.Popen(_pretrain(folder, run, 1), env=_environment(), stderr=subprocess.DEVNULL) for run in runs
    ]
    for process in started:
        if process.wait():
            raise RuntimeError(f"a pre-training by itself ended with {process.returncode}")
    record = PretrainRecord.load(runs[0])
    assert record.parameters, "a new run has them"
    return statistics.median(_seconds(run) for run in runs), record.parameters


def step_together(folder: Path, ranks: int, name: str) -> float:
    """Seconds of a step of ranks that make one run."""
    run = folder / f"together-{name}"
    launch = [*PRETRAIN, "launch", "local", "--processes", str(ranks), "--", *_pretrain(folder, run, ranks)[3:]]
    subprocess.run(launch, check=True, env=_environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return _seconds(run)


def _pretrain(folder: Path, run: Path, ranks: int) -> list[str]:
    settings = SETTINGS | {"pretrain.batch_size": PATCHES * ranks}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [*PRETRAIN, "pretrain", "--data", str(folder / "shards"), "--run", str(run), *words]


def _seconds(run: Path) -> float:
    """Of a step, the median of the logs of the run's second half."""
    logged = read_metrics(run / METRICS)
    return statistics.median(entry["seconds"] for entry in logged[len(logged) // 2 :])


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}
