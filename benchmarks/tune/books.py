"""Benchmark the books of a study: what does it cost to begin one of many trials, to note them, to look at it, to go on?

    python benchmarks/tune/books.py --out OUT                     300 to 10,000 trials, a minute or two

Nothing is trained and Ray is not started: each trial reports three points of its curve and ends at once. Times are of
the processor, of one process; memory is what the process holds at the end of a size, the largest last. Results are in
``books.json``, a table in ``books.md``, a chart in ``books.png``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.tune.run import machine, resident_mb

POINTS = 3
"""Of each trial's curve."""
PARTS = {
    "begin_s": "begin",
    "note_s": "note",
    "save_s": "save",
    "watch_s": "one look",
    "page_s": "page",
    "go_on_s": "go on",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, nargs="+", default=[300, 1000, 3000, 10_000])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = []
    for trials in options.trials:
        with tempfile.TemporaryDirectory() as folder:
            sizes.append(measure(trials, Path(folder)))
        print(json.dumps(sizes[-1]), file=sys.stderr)
    found = {"machine": machine(), "sizes": sizes}
    (options.out / "books.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "books.md").write_text(summary(found))
    draw(sizes, options.out / "books.png")
    print((options.out / "books.md").read_text())


def measure(trials: int, folder: Path) -> dict[str, Any]:
    """Seconds of the parts, the size of the ledger, and the memory of this process."""
    from mixcl_dist.cluster.trials import Outcome
    from mixcl_dist.config import Config, replace
    from mixcl_dist.report import write_report
    from mixcl_dist.studies.study import StudyTable
    from mixcl_dist.studies.watching import standing, text

    found: dict[str, Any] = {"trials": trials}

    @contextlib.contextmanager
    def timed(part: str) -> Iterator[None]:
        begin = time.process_time()
        yield
        found[part] = round(time.process_time() - begin, 3)

    search = {"finetune.learning_rate": {"loguniform": [1e-4, 1e-2]}, "finetune.batch_size": {"choice": [1, 2]}}
    settings = {"study.fractions": [1.0], "study.seeds": [0], "study.search": search, "study.samples": trials}
    config = replace(Config(), settings)
    rows = [
        {"id": f"scratch-1-s0-p{number}", "fraction": 1.0, "seed": 0, "start": None, "params": params_of(number)}
        for number in range(trials)
    ]
    with timed("begin_s"):
        table = StudyTable.open(folder, config, folder, [], rows)
    with timed("note_s"), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        for trial in table.proposals():
            for point in range(1, POINTS + 1):
                table.reported(trial, {"step": 100 * point, "dice": 0.2 * point})
            table.ended(Outcome(trial, {"mean": trial["params"]["finetune.learning_rate"] * 50, "class_mean": {},
                                        "seconds": 1.0}))  # fmt: skip
    with timed("watch_s"):
        text(standing(folder))
    with timed("save_s"):
        table.save()
    with timed("page_s"):
        write_report(folder)
    with timed("go_on_s"):
        StudyTable.open(folder, config, folder, [], rows)
    ledger = (folder / "ledger.jsonl").stat().st_size / 1e6
    return found | {"ledger_mb": round(ledger, 2), "resident_mb": resident_mb()}


def params_of(number: int) -> dict[str, Any]:
    return {"finetune.learning_rate": 1e-4 + 1e-6 * (number % 9_000), "finetune.batch_size": 1 + number % 2}


def summary(found: dict[str, Any]) -> str:
    lines = [
        f"Machine: {found['machine']}.",
        "",
        f"| trials | {' | '.join(f'{name} (s)' for name in PARTS.values())} | ledger (MB) | memory (MB) |",
        "|" + "---|" * (len(PARTS) + 3),
    ]
    for size in found["sizes"]:
        seconds = " | ".join(f"{size[part]:.2f}" for part in PARTS)
        lines.append(f"| {size['trials']:,} | {seconds} | {size['ledger_mb']:.1f} | {size['resident_mb']:.0f} |")
    return "\n".join(lines) + "\n"


def draw(sizes: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    trials = [size["trials"] for size in sizes]
    for part, name in PARTS.items():
        axes.loglog(trials, [max(size[part], 1e-3) for size in sizes], marker="o", markersize=3, label=name)
    axes.loglog(trials, [n / 1000 for n in trials], color="0.7", linestyle=":", label="1 ms a trial")
    axes.set_xlabel("trials of the study")
    axes.set_ylabel("seconds of one core")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
