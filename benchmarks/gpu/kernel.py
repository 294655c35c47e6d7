"""The kernel benchmark within the time that is granted; its own results come back whole."""

from __future__ import annotations

import argparse
import shutil

from worker import work  # first, as it makes what follows importable

# isort: split
import report
import run

ENDING = 20  #: seconds that what has been begun may take


def measure(item: str, options: argparse.Namespace) -> dict:
    folder = options.work / "kernel"
    shutil.rmtree(folder, ignore_errors=True)
    minutes = ["--minutes", str((options.seconds - ENDING) / 60)]
    tiny = ["--quick", "--device", "cpu", "--threads", "1", "--minutes", "0"]
    code = run.main(["--out", str(folder), *(tiny if options.tiny else minutes)])
    for name in ("results.jsonl", "summary.md"):
        if (folder / name).exists():
            shutil.copy(folder / name, options.out / f"kernel-{name}")
    bars = [record for record in report.read(folder) if record["kind"] == "bar"]
    met = sum(bar["met"] is True for bar in bars)
    figures = {bar["name"]: bar["figure"] for bar in bars if bar["met"] is not None}
    return {"passed": code == 0, "bars": figures, "text": f"{met} of {len(bars)} bars met; see kernel-summary.md"}


if __name__ == "__main__":
    work(__doc__, measure)
