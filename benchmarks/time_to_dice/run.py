"""Time to Dice: one clock from an empty folder to a mean Dice of 0.30 on development scans of OpenKBP, two labelled.

    python benchmarks/time_to_dice/run.py --ct ../shared/ct --out OUT              a quarter of an hour on a CPU core
    python benchmarks/time_to_dice/run.py --ct ../shared/ct --out OUT --record     and a row of the committed table
    python benchmarks/time_to_dice/run.py --quick --out OUT                        a phantom: does everything work here?

`mixcl shards build`, `pretrain` and `finetune` run as a user runs them, starts and all; the clock stops with the first
point of the curve at which the Dice is reached, and so does the trial. Whatever becomes faster, anywhere, shows.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mixcl_dist.config import load, to_yaml
from mixcl_dist.phantom import write_cohort
from mixcl_dist.profiling.result import Figure, Result, ended, environment
from mixcl_dist.records import CURVE, CurvePoint, read_curve

FOLDER = Path(__file__).resolve().parent
RECORD = FOLDER.parent / "results" / "time_to_dice" / "record.csv"
LOOK_EVERY_S = 0.25
TOTAL, WITHOUT = "time to Dice", "time without it"


class Task(NamedTuple):
    """What has to be reached, on which data and with which settings."""

    dice: float
    data: Path
    settings: Path
    recipe: str | None

    @property
    def words(self) -> list[str]:
        return [*(["--recipe", self.recipe] if self.recipe else []), "--config", str(self.settings)]

    @property
    def digest(self) -> str:
        """Of all settings: rows of another digest are of another task."""
        return sha256(f"{self.dice} {to_yaml(load(self.settings, recipe=self.recipe))}".encode()).hexdigest()[:12]


def main() -> int:
    options = _parse()
    options.out.mkdir(parents=True, exist_ok=True)
    task = phantom(options.out) if options.quick else openkbp(options.ct)
    here = environment()
    seconds, point = attempt(task, options.out)
    reached = is_reached(point, task.dice)
    times = {**seconds, TOTAL if reached else WITHOUT: sum(seconds.values())}
    result = Result(
        benchmark="time_to_dice",
        command=("benchmarks/time_to_dice/run.py", f"task {task.digest}"),
        quick=options.quick,
        environment=ended(here),
        figures={name: Figure(unit="s", better="less", samples=(took,)) for name, took in times.items()},
        said=said(sum(seconds.values()), point, task.dice),
    )
    result.save(options.out)
    print(result.said)
    if options.record and reached and point:
        add_row(result, point, task)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ct", type=Path, help="folder that holds openkbp/dataset.json")
    parser.add_argument("--out", type=Path, required=True, help="empty folder for shards, runs and result.json")
    parser.add_argument("--record", action="store_true", help=f"add a row to {RECORD.relative_to(FOLDER.parents[1])}")
    parser.add_argument("--quick", action="store_true", help="a phantom and any Dice")
    options = parser.parse_args()
    if options.quick and options.record:
        parser.error("--record: --quick is another task; leave one of them out")
    if not options.quick and not (options.ct and (options.ct / "openkbp" / "dataset.json").is_file()):
        parser.error("--ct: give the folder of the public scans, which holds openkbp/dataset.json, or --quick")
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out {options.out}: holds something already; the clock begins with an empty folder")
    return options


def openkbp(ct: Path) -> Task:
    return Task(0.30, ct / "openkbp" / "dataset.json", FOLDER / "task.yaml", "few_label")


def phantom(out: Path) -> Task:
    size = {"size": (40, 34, 40), "spacing_mm": 9.0}
    data = write_cohort(out / "cohort", training=4, validation=1, unlabelled=0, **size)[0]  # type: ignore[arg-type]
    return Task(0.0, data, FOLDER / "quick.yaml", None)


def attempt(task: Task, out: Path) -> tuple[dict[str, float], CurvePoint | None]:
    """Seconds of each stage, the last one up to the point of the curve that is returned: the first at which the Dice
    is reached, or the last."""
    shards, pretrained, trial = out / "shards", out / "pretrained", out / "trial"
    stages = {
        "build": ["shards", "build", str(task.data), "--out", str(shards)],
        "pre-training": ["pretrain", "--data", str(shards), "--run", str(pretrained)],
        "fine-tuning": ["finetune", "--data", str(task.data), "--from", str(pretrained), "--run", str(trial)],
    }
    seconds = {}
    for name, words in stages.items():
        begin = time.monotonic()
        run([*words, *task.words], trial / CURVE, task.dice)
        seconds[name] = time.monotonic() - begin
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
    points = read_curve(trial / CURVE)
    return seconds, next((point for point in points if is_reached(point, task.dice)), points[-1] if points else None)


def run(words: Sequence[str], curve: Path, dice: float) -> None:
    """A command of mixcl, which is ended once the curve reaches the Dice."""
    process = subprocess.Popen([sys.executable, "-m", "mixcl_dist", *words], stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            if any(is_reached(point, dice) for point in read_curve(curve)):
                return
            time.sleep(LOOK_EVERY_S)
        if process.returncode:
            raise SystemExit(f"mixcl {words[0]} ended with exit code {process.returncode}; see what it said above")
    finally:
        process.terminate()
        process.wait()


def is_reached(point: CurvePoint | None, dice: float) -> bool:
    return point is not None and point.mean is not None and point.mean >= dice


def said(total: float, point: CurvePoint | None, dice: float) -> str:
    if point is None:
        return f"No Dice was measured in {total:.0f} s."
    at = f"{point.mean or 0:.3f} at step {point.step} of fine-tuning, {total:.0f} s from an empty folder"
    return f"Dice {at}." if is_reached(point, dice) else f"Dice {dice} was not reached: {at}."


def add_row(result: Result, point: CurvePoint, task: Task) -> None:
    """Add the run to the committed table."""
    here = result.environment
    row = {
        "begun": here.begun,
        "commit": here.commit,
        "machine": here.card or here.machine,
        "threads": here.variables.get("OMP_NUM_THREADS", ""),
        "load": f"{here.load_before:.1f} to {here.load_after:.1f}",
        "task": task.digest,
        "dice": f"{point.mean:.3f}",
        **{f"{name} (s)": f"{figure.samples[0]:.0f}" for name, figure in result.figures.items()},
    }
    is_new = not RECORD.exists()
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    with RECORD.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
