"""Benchmark the driver of a study: what does a trial cost beside its own time, and does that grow with their number?

    python benchmarks/tune/run.py --out OUT --trials 40                            minutes
    python benchmarks/tune/run.py --out OUT --trials 1000 --only study reusing     minutes
    python benchmarks/tune/run.py --out OUT --only study                           10,000 trials: half an hour
    python benchmarks/tune/run.py --out OUT                                        hours, for plain `Tuner`

Three contestants run the same trials, which sleep, on the same Ray with as many cores, each in a process of its own and
one after the other: a study's table with its ledger, Ray Tune's own `Tuner` with an empty grid and the same function,
and that with `reuse_actors`. The overhead of a trial is the wall time of all of them, after the first
that has ended, less the time slept by as many as run at once. Results are in ``results.json`` (seconds and resident
memory of the driver as trials end), a table in ``summary.md``, a chart in ``overhead.png``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

CONTESTANTS = {
    "study": "a study of `mixcl tune`",
    "tuner": "Tuner",
    "reusing": "Tuner, reuse_actors",
}
POINTS = 200
"""Of each curve, about."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=0.1, help="of a trial")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="of the contestants")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(measure(options)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    for _ in range(options.repeats):
        for name in options.only:
            command = [sys.executable, __file__, *sys.argv[1:], "--contestant", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{CONTESTANTS[name]}: {runs[name][-1]['overhead_s']:.3f} s a trial", file=sys.stderr)
    found = {"machine": machine(), "trials": options.trials, "seconds": options.seconds, "cores": options.cores}
    (options.out / "results.json").write_text(json.dumps(found | {"runs": runs}, indent=1) + "\n")
    (options.out / "summary.md").write_text(summary(found, runs))
    draw(runs, options.out / "overhead.png")
    print((options.out / "summary.md").read_text())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run one contestant in this process."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # else other work on the machine is measured, too
    curve: list[tuple[int, float, float]] = []
    begin, every = time.monotonic(), max(1, options.trials // POINTS)
    ended = 0

    def note() -> None:
        nonlocal ended
        ended += 1
        if ended == 1 or ended % every == 0:
            curve.append((ended, round(time.monotonic() - begin, 3), resident_mb()))

    with tempfile.TemporaryDirectory() as folder:
        {"study": study, "tuner": tuner, "reusing": reusing}[options.contestant](options, Path(folder), note)
    assert ended == options.trials, f"{ended} of {options.trials} trials ended"
    (first, begun, memory), (last, over, memory_at_end) = curve[0], curve[-1]
    slept = (last - first) * options.seconds / options.cores
    return {
        "curve": curve,
        "overhead_s": (over - begun - slept) / (last - first),
        "seconds": over,
        "memory_growth_mb": memory_at_end - memory,
    }


def study(options: argparse.Namespace, folder: Path, note: Any) -> None:
    from mixcl_dist.cluster.trials import run_trials
    from mixcl_dist.config import Config, replace
    from mixcl_dist.studies.study import StudyTable

    seconds, seeds = options.seconds, list(range(options.trials))
    settings = {"study.fractions": [1.0], "study.seeds": seeds, "trials.concurrent": options.cores}
    config = replace(Config(), settings)
    common: dict[str, Any] = {"fraction": 1.0, "start": None, "params": {}}
    trials = [common | {"id": f"scratch-1-s{seed}", "seed": seed} for seed in seeds]
    table = StudyTable.open(folder, config, folder, [], trials)

    def ended(outcome):
        table.ended(outcome)
        note()

    def sleep(trial, report):
        import time

        time.sleep(seconds)
        return {"mean": 0.5, "class_mean": {"organ": 0.5}, "seconds": seconds}

    with (folder / "log").open("w") as log, contextlib.redirect_stderr(log):
        run_trials(sleep, table.proposals(), storage=folder / "tune", config=config.trials, ended=ended)
    table.save()


def tuner(options: argparse.Namespace, folder: Path, note: Any, reuse: bool = False) -> None:
    from ray import tune

    from mixcl_dist.cluster.ray import connection

    seconds = options.seconds

    def sleep(config):
        import time

        time.sleep(seconds)
        tune.report({"slept": seconds})

    class Noting(tune.Callback):
        def on_trial_complete(self, iteration, trials, trial, **info):
            note()

        def __reduce__(self):
            return tune.Callback, ()

    with connection("local", option="--address"):
        tune.Tuner(
            tune.with_resources(sleep, {"cpu": 1}),
            param_space={"number": tune.grid_search(list(range(options.trials)))},
            tune_config=tune.TuneConfig(max_concurrent_trials=options.cores, reuse_actors=reuse),
            run_config=tune.RunConfig(storage_path=str(folder), callbacks=[Noting()], verbose=0),
        ).fit()


def reusing(options: argparse.Namespace, folder: Path, note: Any) -> None:
    tuner(options, folder, note, reuse=True)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def machine() -> str:
    from mixcl_dist.run import machine as of_run

    found = of_run()
    return f"{found.cpu}, {found.cores} cores, {found.memory_gb} GB, load {os.getloadavg()[0]:.1f} at the end"


def summary(found: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        f"{found['trials']} trials of {found['seconds']} s, {found['cores']} at once. Machine: {found['machine']}.",
        "",
        "| driver | overhead a trial (s) | growth of its memory (MB) |",
        "|---|---|---|",
    ]
    for name in runs:
        title = CONTESTANTS[name]
        overhead, memory = ([one[key] for one in runs[name]] for key in ("overhead_s", "memory_growth_mb"))
        lines.append(f"| {title} | {spread(overhead, 3)} | {spread(memory, 0)} |")
    best = {name: min(one["overhead_s"] for one in found) for name, found in runs.items()}
    for name in sorted(best.keys() - {"study"}) if "study" in best else ():
        lines += [
            "",
            f"Overhead of a study beside that of {CONTESTANTS[name]}, best runs: {best['study'] / best[name]:.2f}.",
        ]
    return "\n".join(lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{low:.{digits}f}" if len(values) == 1 else f"{low:.{digits}f} to {high:.{digits}f}"


def draw(runs: dict[str, list[dict[str, Any]]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, column, label in zip(figure.subplots(1, 2), (1, 2), ("seconds", "driver, resident MB"), strict=True):
        for name, (first, *_) in runs.items():
            points = [(point[0], point[column]) for point in first["curve"]]
            axes.plot(*zip(*points, strict=True), label=CONTESTANTS[name])
        axes.set_xlabel("trials that have ended")
        axes.set_ylabel(label)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
