"""Benchmark the stream: does every loader deliver the same samples, and how fast is each beside decoding alone?

    benchmarks/stream/environment.sh VENV                        once: litdata and mosaicml-streaming
    python benchmarks/stream/run.py --out OUT --baselines VENV   two cores: under ten minutes, the corpus included
    python benchmarks/stream/run.py --quick                      a small corpus: does everything work here?
    python benchmarks/stream/run.py --variants --out OUT/variants  webdataset with other settings than those compared

Each contestant runs in a process of its own with its worker processes, all of which are stopped while another's turn
is timed. Results are in ``results.json``, tables and bars in ``summary.md``, a chart in ``throughput.png``. The exit
code is 1 where the stream delivers other samples than the corpus holds, which is found out before anything is timed;
a baseline that does is left out and named. A missed bar is printed, and is no error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import report
from corpus import Corpus, prepare
from machine import describe_machine
from process import ContestantError, Process

HERE = (
    "PatchStream",
    "decoding alone",
    "decoding into batches",
    "webdataset, blosc2",
    "webdataset, blosc2, into the batch",
    "webdataset, npz",
    "DataLoader by index",
)
ELSEWHERE = ("litdata, blosc2", "litdata, array", "mosaicml-streaming, blosc2", "mosaicml-streaming, array")
VARIANTS = (
    "webdataset, blosc2",
    "webdataset, blosc2, into the batch",
    "webdataset's own collation",
    "into the batch, not shared",
    "shuffle buffer of 64",
    "prefetch_factor 4",
    "batched by the DataLoader",
)
PACKAGES = ("torch", "numpy", "blosc2", "webdataset")
PACKAGES_ELSEWHERE = ("litdata", "mosaicml-streaming")
FOLDER = Path(__file__).resolve().parent
SHARED_CT = FOLDER.parents[2] / "shared" / "ct"


class Setting(NamedTuple):
    workers: int
    batch_size: int


class Plan(NamedTuple):
    settings: list[Setting]
    rounds: int
    seconds: float
    """Of a turn, at least."""


FULL = Plan([Setting(*pair) for pair in product((1, 2), (8, 32))], rounds=7, seconds=0.8)
QUICK = Plan([Setting(2, 8)], rounds=3, seconds=0.2)
OF_VARIANTS = Plan([Setting(1, 32), Setting(2, 32)], rounds=7, seconds=0.8)


class Session:
    """What all measurements share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.plan = OF_VARIANTS if options.variants else QUICK if options.quick else FULL
        self.begin = time.perf_counter()
        machine = describe_machine(PACKAGES)
        if options.baselines:
            machine["versions"] |= baseline_versions(options.baselines)
        self.results: dict = {"machine": machine, "gate": [], "timings": [], "left_out": []}
        options.out.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - self.begin), 60)
        print(f"[{minutes:02d}:{seconds:02d}] {text}", flush=True)

    def leave_out(self, name: str, setting: Setting, why: str) -> None:
        self.results["left_out"].append({"name": name, **setting._asdict(), "why": why})
        self.say(f"{name} is left out: {why}")

    def contestants(self, setting: Setting, corpus: Corpus) -> dict[str, list[str]]:
        """Name → command."""
        arguments = [str(corpus.folder), str(setting.batch_size), str(setting.workers)]
        host = str(FOLDER / "host.py")
        here = {name: [sys.executable, host, "contestants", name, *arguments] for name in HERE}
        if self.options.variants:
            return {name: [sys.executable, host, "contestants", name, *arguments] for name in VARIANTS}
        if self.options.baselines is None:
            return here
        python = str(self.options.baselines / "bin" / "python")
        return here | {name: [python, host, "foreign", name, *arguments] for name in ELSEWHERE}


def main(argv: list[str] | None = None) -> int:
    session = Session(parse(argv))
    machine = session.results["machine"]
    session.say(f"{machine['device']}; load {machine['load']:.1f}; {machine['versions']}")
    options = session.options
    corpus = prepare(options.ct, options.data, options.quick, options.baselines, session.say)
    session.results |= {"corpus": corpus.facts, "quick": options.quick}
    session.say(f"corpus: {report.corpus_text(corpus.facts)}")
    for setting in session.plan.settings:
        if not measure(session, setting, corpus):
            return 1
    machine["load_after"] = os.getloadavg()[0]
    machine["minutes"] = round((time.perf_counter() - session.begin) / 60, 1)
    write(session)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stream"), help="folder of the results (%(default)s)")
    parser.add_argument("--ct", type=Path, default=SHARED_CT, help="folder with openkbp/ and torso/ (%(default)s)")
    parser.add_argument(
        "--data", type=Path, help="where the corpus is kept for the next run (OUT/corpus, removed by nobody)"
    )
    parser.add_argument("--baselines", type=Path, metavar="VENV", help="what environment.sh made")
    parser.add_argument("--quick", action="store_true", help="a small corpus, one setting; no figures to quote")
    parser.add_argument("--variants", action="store_true", help="other settings of webdataset")
    options = parser.parse_args(argv)
    if not (options.ct / "openkbp").is_dir():
        parser.error(f"{options.ct} holds no openkbp/; give the folder with --ct")
    options.data = (options.data or options.out / "corpus") / ("quick" if options.quick else "full")
    return options


def baseline_versions(environment: Path) -> dict[str, str]:
    code = f"from importlib.metadata import version as v; print(*(v(name) for name in {PACKAGES_ELSEWHERE}))"
    found = subprocess.run([environment / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(PACKAGES_ELSEWHERE, found.stdout.split(), strict=True))


def measure(session: Session, setting: Setting, corpus: Corpus) -> bool:
    """All contestants at one setting; whether the stream delivers what it should."""
    session.say(f"{report.setting_text(setting._asdict())}: does each deliver every sample once?")
    processes: dict[str, Process] = {}
    try:
        for name, command in session.contestants(setting, corpus).items():
            processes[name] = Process(name, command)
        with ThreadPoolExecutor(2) as pool:
            passed = dict(zip(processes, pool.map(partial(passes_gate, corpus), processes.values()), strict=True))
        for name, why_not in passed.items():
            session.results["gate"].append({"name": name, **setting._asdict(), "passed": why_not is None})
            if why_not:
                session.leave_out(name, setting, why_not)
                processes.pop(name).close()
        if passed.get("PatchStream"):
            return False
        take_turns(session, setting, processes)
        return True
    finally:
        for process in processes.values():
            process.close()


def passes_gate(corpus: Corpus, process: Process) -> str | None:
    """Why a contestant cannot be compared, or None; then it is ready for its first turn."""
    try:
        found = Counter(process.ask("epoch"))
        wanted = Counter(corpus.digests)
        if found != wanted:
            missing, strange = (wanted - found).total(), (found - wanted).total()
            return f"of {wanted.total()} samples {missing} are missing, {strange} are others or come twice"
        process.ask("begin")
    except ContestantError as error:
        return f"failed: {error}"
    return None


def take_turns(session: Session, setting: Setting, processes: dict[str, Process]) -> None:
    """Rounds in which each contestant is timed once, after a round that is not counted; each begins with another."""
    rates: dict[str, list[float]] = {name: [] for name in processes}
    names = list(processes)
    for number in range(session.plan.rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            lap = processes[name].ask(f"turn {session.plan.seconds}")
            if number:
                rates[name].append(lap["patches"] / lap["seconds"])
    for name, laps in rates.items():
        session.results["timings"].append({"name": name, **setting._asdict(), "patches_per_second": laps})
        session.say(f"  {name:36} {report.spread_text(laps, '{:,.0f}')} patches/s")


def write(session: Session) -> None:
    out = session.options.out
    if not session.options.variants:
        for bar in report.bars(session.results):
            print(f"{bar.verdict:>12}  {bar.name}: {bar.figure}", flush=True)
    (out / "results.json").write_text(json.dumps(session.results, indent=1) + "\n")
    (out / "summary.md").write_text(report.summary(session.results))
    report.chart(session.results, out / "throughput.png")
    print(out / "summary.md")


if __name__ == "__main__":
    sys.exit(main())
