"""The queue of `run.py`: which jobs are run in which time, and what is recorded of them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import stages
import summary
from stages import Job

from mixcl_dist.studies.ledger import STATES, Ledger, digest_of, read
from mixcl_dist.studies.table import programs

ROOT = Path(__file__).resolve().parents[2]

CLOSING = 5.0  #: seconds at the end for the summary
LEAST = 10.0  #: seconds; with less left nothing is begun


class Shares:
    """Splits a time among stages by their weights; what one leaves over goes to those after it."""

    def __init__(self, seconds: float, weights: dict[str, float]) -> None:
        self.end = time.monotonic() + seconds
        self.weights = dict(weights)

    def deadline(self, stage: str) -> float:
        """When the stage that begins now has to end."""
        left, total = max(self.end - time.monotonic(), 0), sum(self.weights.values())
        return time.monotonic() + left * self.weights.pop(stage) / total


@dataclass
class Queue:
    """Runs jobs and records their items."""

    ledger: Ledger
    work: Path
    out: Path
    tiny: bool
    root: Path = ROOT
    folder: Path = ROOT / "benchmarks" / "gpu"

    def __post_init__(self) -> None:
        self.wrong: list[str] = []
        self.log = (self.out / "log").open("a", encoding="utf-8")

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def digest(self, job: Job) -> str:
        return digest_of(self.root, job.sources, job.program, self.tiny)

    def state(self, job: Job, item: str) -> str:
        if job.makes:
            return "done" if (self.work / job.makes).exists() else "missing"
        return self.ledger.state(item, self.digest(job))

    def wanted(self, jobs: list[Job]) -> list[Job]:
        """Jobs with something to do and those that they need, what is missing first."""
        kept = [job for job in jobs if not job.makes and any(self.state(job, item) != "done" for item in job.items)]
        needed: set[str] = set()
        for job in reversed(jobs):  # a job's needs are made by jobs before it
            if job in kept or job.makes in needed:
                needed |= {name for name in job.needs if not (self.work / name).exists()}
        chosen = [job for job in jobs if job in kept or job.makes in needed]
        return sorted(chosen, key=lambda job: (job.wave, min(STATES.index(self.state(job, i)) for i in job.items)))

    def run_stage(self, jobs: list[Job], deadline: float) -> None:
        """Wave by wave; what is not begun by the deadline stays missing."""
        jobs = self.wanted(jobs)
        for wave in sorted({job.wave for job in jobs}):
            with ThreadPoolExecutor(stages.SIDE_BY_SIDE) as pool:
                list(pool.map(self.run_job, [j for j in jobs if j.wave == wave], [deadline] * len(jobs)))

    def run_job(self, job: Job, deadline: float) -> None:
        """Start a job's program, again where it dies, until all its items are known or the time is over."""
        items = [item for item in job.items if self.state(job, item) != "done"]
        items.sort(key=lambda item: STATES.index(self.state(job, item)))
        deadline = min(deadline, time.monotonic() + job.limit)
        while items and deadline - time.monotonic() > (0 if self.tiny else LEAST):
            if failed := [item for item in job.barred_by if self.has_failed(item)]:
                self.wrong += items
                return self.say(f"{', '.join(items)}: not measured, as {failed[0]} failed")
            if absent := [name for name in job.needs if not (self.work / name).exists()]:
                return self.say(f"{', '.join(items)}: not measured, as {absent[0]} was not made")
            known, ending = self.run_program(job, items, deadline)
            unknown = [item for item in items if item not in known]
            if unknown and ending:
                self.record(job, {"item": unknown.pop(0), "passed": False, "text": ending})
            items = unknown

    def has_failed(self, item: str) -> bool:
        """Also with other sources: who has changed them has to let the gate say so."""
        return self.ledger.records.get(item, {}).get("status") == "failed"

    def run_program(self, job: Job, items: list[str], deadline: float) -> tuple[set[str], str]:
        """The items that it reported, and how it ended if that was not well: its last line, or its limit."""
        begin, seconds = time.monotonic(), deadline - time.monotonic()
        arguments = ["--work", str(self.work), "--out", str(self.out), "--seconds", f"{seconds:.0f}"]
        command = stages.command(job, items, str(self.folder), arguments + ["--tiny"] * self.tiny)
        try:
            process = programs.start(command, environment=self.environment(), output=subprocess.PIPE, folder=self.root)
        except OSError as error:
            return set(), str(error)
        limit = threading.Timer(seconds, programs.kill, [process])
        limit.start()
        known, last = self.follow(process, job, items)
        code, out_of_time = process.wait(), time.monotonic() - begin >= seconds
        limit.cancel()
        if out_of_time:
            return known, f"not done within {seconds:.0f} s" if seconds >= job.limit - 1 else ""
        if code and job.launcher:  # the sanitizer's, which tells by its exit code, whatever the program reported
            known = set()
        if code == 0 and not known and len(items) == 1:
            self.record(job, {"item": items[0], "text": last}, time.monotonic() - begin)
            return set(items), ""
        return known, f"exit code {code}: {last}" if code else "ended without a report"

    def follow(self, process: subprocess.Popen, job: Job, items: list[str]) -> tuple[set[str], str]:
        """Record what a program reports as it reports it; returns the items and its last line that is no report."""
        begin, known, last = time.monotonic(), set(), ""
        for line in process.stdout:
            print(line, end="", file=self.log, flush=True)
            report = _report(line)
            if report and report["item"] in items:
                known.add(report["item"])
                self.record(job, report, time.monotonic() - begin)
            elif line.strip():
                last = line.strip()[-300:]
        return known, last

    def record(self, job: Job, report: dict, seconds: float = 0.0) -> None:
        figures = {name: value for name, value in report.items() if name not in ("item", "passed", "partial")}
        item, passed = report["item"], report.get("passed", True)
        done = "partial" if report.get("partial") else "done"
        if not passed:
            self.wrong.append(item)
        self.say(f"{'' if passed else 'WRONG '}{item} ({seconds:.0f} s): {figures.get('text', '')}")
        if not (job.makes and passed):  # whether it is there says more than a record
            date = time.strftime("%Y-%m-%d")
            self.ledger.add(item, self.digest(job), done if passed else "failed", date=date, **figures)

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": f"{self.root}{os.pathsep}{self.work / 'site'}",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": str(self.work / "cache"),
            "NCCL_SOCKET_IFNAME": "lo",  # no network, of which NCCL wants an interface all the same
            "DS_ACCELERATOR": "cpu" if self.tiny else "cuda",  # else DeepSpeed looks for packages that name one
            "TRITON_INTERPRET": str(int(self.tiny)),
        }


def _report(line: str) -> dict | None:
    if not line.startswith('{"item"'):
        return None
    try:
        return json.loads(line)
    except ValueError:  # cut short by a killed process
        return None


def measure(options: argparse.Namespace, begin: float) -> int:
    """Run the stages in the seconds that are granted from `begin` on; 1 where something is wrong."""
    machine = describe_machine(options.tiny)
    earlier = sorted(options.results.glob("*/ledger.jsonl"))
    ledger = Ledger(options.out / "ledger.jsonl", machine["card"], earlier)
    bring_table(earlier, machine["card"], options.out)
    queue = Queue(ledger, options.work.resolve(), options.out.resolve(), options.tiny)
    queue.say(f"{machine['text']}; begun after {time.monotonic() - begin:.0f} s")
    plans = {stage: stages.plan(stage, machine["entries"], options.tiny) for stage in options.stages}
    weights = {stage: weight(queue.wanted(jobs)) for stage, jobs in plans.items()}
    shares = Shares(options.seconds - CLOSING - (time.monotonic() - begin), {s: w for s, w in weights.items() if w})
    for stage, jobs in plans.items():
        if weights[stage]:
            queue.run_stage(jobs, shares.deadline(stage))
        write_summary(options.out, machine["text"], queue, plans)
    print(write_summary(options.out, machine["text"], queue, plans))
    return 1 if queue.wrong else 0


def bring_table(earlier: Iterable[Path], card: str, out: Path) -> None:
    """Copy to OUT, where it has none, the few-label table that is kept beside a committed ledger of this card."""
    for path in earlier:
        kept = path.with_name(stages.KEPT_TABLE)
        if kept.exists() and not (out / kept.name).exists() and any(record["card"] == card for record in read(path)):
            shutil.copy(kept, out)


def write_summary(out: Path, machine: str, queue: Queue, plans: dict[str, list[Job]]) -> str:
    jobs = [job for jobs in plans.values() for job in jobs if not job.makes]
    states = {item: queue.state(job, item) for job in jobs for item in job.items}
    text = summary.write(machine, states, queue.ledger.records, queue.wrong)
    (out / "summary.md").write_text(text, encoding="utf-8")
    return text


def weight(jobs: Iterable[Job]) -> float:
    """Seconds that jobs may take: of a wave those of its longest."""
    waves: dict[int, float] = {}
    for job in jobs:
        waves[job.wave] = max(waves.get(job.wave, 0.0), job.limit)
    return sum(waves.values())


def describe_machine(tiny: bool) -> dict:
    """The card, the tuning table's entries for it, and a line for people; asked of another process, which frees it."""
    program = (
        "import json, platform, torch, triton, numpy; from mixcl_dist.kernels import tuning; import gate\n"
        f"device = torch.device('{'cpu' if tiny else 'cuda'}')\n"
        "card = torch.cuda.get_device_name() if device.type == 'cuda' else 'no GPU, emulated'\n"
        "text = f'{card}; torch {torch.__version__}, triton {triton.__version__}, NumPy {numpy.__version__}, '\n"
        "text += f'Python {platform.python_version()}'\n"
        "entries = gate.entry_names(tuning.architecture_of(device))\n"
        "print(json.dumps({'card': card, 'text': text, 'entries': entries}))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks" / "kernel")])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": str(int(tiny))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"no machine to measure on: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
