"""What bounds each kernel? One forward and backward under Nsight Compute, its hardware counters kernel by kernel."""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterable

from worker import work  # first, as it makes what follows importable

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "Occupancy", "LaunchStats")
SHOWN = ("Duration", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput", "Achieved Occupancy")
LONGEST = 4  #: kernels in the line for people
ROWS, WIDTH = 65_536, 128


def measure(item: str, options: argparse.Namespace) -> dict:
    sections = [word for section in SECTIONS for word in ("--section", section)]
    command = ["ncu", "--csv", "--clock-control", "none", "--profile-from-start", "off", *sections]
    done = subprocess.run([*command, sys.executable, __file__, "--once"], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if not lines:
        raise SystemExit((done.stdout + done.stderr).strip().splitlines()[-1])
    (options.out / "counters.csv").write_text("\n".join(lines) + "\n")
    kernels = by_kernel(lines)
    longest = sorted(kernels.values(), key=lambda found: -found.get("Duration", 0))[:LONGEST]
    text = "; ".join(f"{found['Kernel Name'][:40]}: {describe(found)}" for found in longest)
    return {"kernels": len(kernels), "text": f"{text}; see counters.csv"}


def by_kernel(lines: Iterable[str]) -> dict[str, dict]:
    """Of every launch its name and the metrics of `SHOWN`, durations in µs."""
    found: dict[str, dict] = {}
    for row in csv.DictReader(lines):
        launch = found.setdefault(row["ID"], {"Kernel Name": row["Kernel Name"]})
        if row["Metric Name"] in SHOWN:
            value = float(row["Metric Value"].replace(",", ""))
            launch[row["Metric Name"]] = value * {"ns": 1e-3, "ms": 1e3, "s": 1e6}.get(row["Metric Unit"], 1)
    return found


def describe(launch: dict) -> str:
    units = {"Duration": "µs"}
    return ", ".join(f"{name.lower()} {launch[name]:.4g} {units.get(name, '%')}" for name in SHOWN if name in launch)


def once() -> None:
    """A call that is profiled, after one that compiles."""
    import gate
    import torch
    from inputs import make_rows

    rows = make_rows("realistic", ROWS, WIDTH, torch.bfloat16, torch.device("cuda"))
    gate.evaluate(rows, "triton")
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    gate.evaluate(rows, "triton")
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    once() if "--once" in sys.argv else work(__doc__, measure)
