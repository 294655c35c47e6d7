"""Benchmark the mixed contrastive loss: is it right, how fast is it, how much memory does it need, and against what?

    python benchmarks/kernel/run.py --out results        # one GPU, torch and triton: under ten minutes
    python benchmarks/kernel/run.py --device cpu         # two cores: under ten minutes
    python benchmarks/kernel/run.py --quick              # small sizes: does everything work here?

Each result is printed and appended to ``results.jsonl`` as soon as it is known; ``summary.md`` has the tables and the
bars. The exit code is 1 where the implementation is wrong, which is found out before anything is timed; a missed bar
is printed, and is no error. Other packages (MONAI, pytorch-metric-learning, Inf-CL) are compared with where installed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gate
import report
import timing
from baselines import BASELINES, Baseline
from inputs import Rows, make_rows
from plan import PAIR, Block, Contest, Large, make_plan

from mixcl_dist.kernels import mixed_contrastive_loss

AGREES = {"loss_error": 1e-2, "gradient_error": 5e-2}  #: a baseline beyond these computes something else
CPU_BUDGET = 8 * report.GIB  #: of a dense baseline
SMALLEST = 512  #: rows; what does not fit there is not timed


@dataclass
class Session:
    """What all measurements share."""

    device: torch.device
    implementation: str
    quick: bool
    journal: report.Journal
    begin: float = field(default_factory=time.perf_counter)
    guessed_left: float = 0.0
    guessed_done: float = 0.0

    def __post_init__(self) -> None:
        self.plan = make_plan(self.device.type, self.quick)
        self.cases = list(gate.cases(self.device, self.quick))
        self.guessed_left = len(self.cases) + sum(self.plan.guess(step, self.device.type) for step in self.plan.steps)
        self.stopwatch = timing.Stopwatch(self.device)
        self.matmuls: dict[torch.dtype, timing.Matmul] = {}

    def say(self, text: str) -> None:
        elapsed = time.perf_counter() - self.begin
        left = self.guessed_left * (elapsed / self.guessed_done if self.guessed_done else 1)
        print(f"[{_clock(elapsed)}, some {_clock(left)} left] {text}", flush=True)

    def advance(self, guessed: float) -> None:
        self.guessed_left -= guessed
        self.guessed_done += guessed

    def skip(self, what: str, why: str) -> None:
        self.journal.add("skipped", what=what, why=why)
        self.say(f"{what}: {why}")

    def matmul(self, dtype: torch.dtype) -> timing.Matmul:
        if dtype not in self.matmuls:
            self.matmuls[dtype] = timing.Matmul(self.stopwatch, dtype, 0.1 if self.quick else 0.5)
        return self.matmuls[dtype]

    def work(self, rows: Rows) -> timing.Work:
        """Forward and backward of what is measured."""
        rows = rows.with_grad()
        return timing.loss_and_gradient(lambda: measured_loss(rows, self.implementation), rows.embeddings, len(rows))


def measured_loss(rows: Rows, implementation: str) -> torch.Tensor:
    return mixed_contrastive_loss(**vars(rows), implementation=implementation).loss


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    implementation = options.implementation or ("triton" if device.type == "cuda" else "tiled")
    session = Session(device, implementation, options.quick, report.Journal(options.out))
    describe_machine(session)
    if not passes_gate(session):
        return 1
    measure(session, options.minutes)
    for bar in report.bars(session.journal, device.type):
        session.journal.add("bar", name=bar.name, figure=bar.figure, met=bar.met)
        print(f"{bar.verdict:>12}  {bar.name}: {bar.figure}", flush=True)
    summary = options.out / "summary.md"
    summary.write_text(report.summary(session.journal, device.type), encoding="utf-8")
    print(summary)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, default=Path("runs/kernel"), help="folder of the results (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default, help="(here: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes; most bars stay unmeasured")
    parser.add_argument("--implementation", help="what is measured (default: triton on a GPU, tiled on the CPU)")
    parser.add_argument("--minutes", type=float, default=8.5, help="start nothing more after (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (%(default)s)")
    return parser.parse_args(argv)


def describe_machine(session: Session) -> None:
    machine = session.journal.add(
        "machine",
        device=timing.device_name(session.device),
        torch=torch.__version__,
        triton=timing.triton_version(),
        python=platform.python_version(),
        implementation=session.implementation,
        quick=session.quick,
        date=datetime.now().astimezone().isoformat(timespec="minutes"),
    )
    session.say(f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}")
    for dtype in gate.HALF if session.device.type == "cuda" else (torch.float32,):
        matmul, name = session.matmul(dtype), gate.dtype_name(dtype)
        session.journal.add("matmul", dtype=name, size=matmul.size, teraflops=matmul.teraflops)
        session.say(f"matmul peak in {name}: {matmul.teraflops:.3g} TFLOP/s, {matmul.size} cubed")


def passes_gate(session: Session) -> bool:
    """Whether the implementation is right; says where it is not."""
    session.say(f"is {session.implementation} right? {len(session.cases)} cases")
    for case in session.cases:
        try:
            result = gate.check(case, session.implementation)
        except Exception as error:  # the cases that remain tell more about what is wrong
            result = {"failed": _one_line(error), "passed": False}
        record = session.journal.add("gate", **gate.describe(case), **result)
        if not record["passed"]:
            session.say(f"WRONG: {record}")
        session.advance(1)
    records, wrong = (session.journal.select("gate", **what) for what in ({}, {"passed": False}))
    if wrong:
        session.say(f"WRONG in {len(wrong)} of {len(records)} cases; nothing is timed")
        return False
    session.say(f"right in all {len(records)} cases, and two runs gave the same bits; {report.worst_errors(records)}")
    return True


def measure(session: Session, minutes: float) -> None:
    """All steps of the plan until the time is over; what fails is told and does not stop the others."""
    actions = {
        Block: lambda session, block: where_it_fits(session, block, time_block),
        Contest: time_contest,
        Large: time_large,
    }
    for step in session.plan.steps:
        if time.perf_counter() - session.begin > 60 * minutes:
            session.skip(_name(step), f"{minutes:g} minutes were over")
        else:
            try:
                actions[type(step)](session, step)
            except Exception as error:
                session.skip(_name(step), f"failed: {_one_line(error)}")
            _free_memory(session)
        session.advance(session.plan.guess(step, session.device.type))


def where_it_fits(session: Session, step: Block | Contest, action: Callable[[Session, Block | Contest], None]) -> None:
    """Act at the step's number of rows, or else at half of it, and so on."""
    while step.rows >= SMALLEST:
        try:
            return action(session, step)
        except timing.OUT_OF_MEMORY as error:
            session.skip(_name(step), f"does not fit ({_one_line(error)})")
        _free_memory(session)  # not within the handler, where the error still holds what had been allocated
        step = step._replace(rows=step.rows // 2 if step.halve else 0)


def time_block(session: Session, block: Block) -> None:
    """The mixes of a block in turn."""
    shape = {"rows": block.rows, "width": block.width, "dtype": gate.dtype_name(block.dtype)}
    works = {mix: session.work(make_rows(mix, *block[:3], session.device)) for mix in block.mixes}
    laps, memory = in_turn(session, works, block.dtype)
    matmul = session.matmul(block.dtype).rates(laps["matmul"])
    for mix in block.mixes:
        record = describe_timing(block, laps[mix], matmul, memory[mix])
        session.say(report.timing_text(session.journal.add("timing", mix=mix, **shape, **record)))
    if set(PAIR) <= set(block.mixes):
        masked, plain = (map(sum, laps[mix]) for mix in PAIR)
        ratio = timing.spread(a / b for a, b in zip(masked, plain, strict=True))
        session.journal.add("masking", **shape, ratio=ratio)
        session.say(f"  realistic takes {report.spread_text(ratio, '{:.3f}')} times as long as InfoNCE without labels")


def describe_timing(block: Block, laps: list[list[float]], matmul: list[float], memory: int | None) -> dict:
    """Times in ms (every one, and median, least, greatest), rate, share of each round's matmul, and extra memory."""
    forward, backward = map(list, zip(*laps, strict=True))
    both = [sum(lap) for lap in laps]
    flop = 6 * block.rows**2 * block.width
    return {
        "forward_ms": timing.spread(forward),
        "backward_ms": timing.spread(backward),
        "both_ms": timing.spread(both),
        "teraflops": flop / statistics.median(both) / 1e9,
        "share": timing.spread(flop / ms / 1e9 / peak for ms, peak in zip(both, matmul, strict=True)),
        "matmul_teraflops": statistics.median(matmul),
        "extra_memory_multiple": _multiple(memory, block),
        "rounds": len(laps),
        "laps_ms": {"forward": forward, "backward": backward, "both": both},
    }


def in_turn(session: Session, works: dict[str, timing.Work], dtype: torch.dtype) -> tuple[dict, dict]:
    """Laps and extra memory of each work; among the laps those of a matmul in every round."""
    memory = dict.fromkeys(works)
    if session.stopwatch.on_gpu:
        for name, work in works.items():
            session.stopwatch.laps(work)  # compiles, which needs memory of its own
            memory[name] = session.stopwatch.extra_memory(work)
    contestants = works | {"matmul": session.matmul(dtype).work}
    return session.stopwatch.rounds(contestants, session.plan.seconds, most=30), memory


def time_contest(session: Session, contest: Contest) -> None:
    """A baseline and the kernel in turn, once the baseline is known to compute the same."""
    baseline = next(baseline for baseline in BASELINES if baseline.name == contest.baseline)
    why_not = baseline.missing(session.device)
    if baseline.compiles and session.quick and session.device.type == "cpu":
        why_not = why_not or "compiles too long for --quick"
    if why_not:
        return session.skip(_name(contest), why_not)
    torch.compiler.reset()  # after some number of shapes it would give up compiling, without a word
    errors = gate.compare_baseline(baseline, _rows_for(session, baseline, contest, session.plan.check_rows))
    if not all(errors[name] <= AGREES[name] for name in errors):
        found = ", ".join(f"{name} {value:.2g}" for name, value in errors.items())
        return session.skip(_name(contest), f"computes something else ({found})")
    where_it_fits(session, contest, lambda session, step: contest_at(session, baseline, step, errors))


def contest_at(session: Session, baseline: Baseline, contest: Contest, errors: dict) -> None:
    need = baseline.peak_bytes(contest.rows, contest.width)
    if session.device.type == "cpu" and need > CPU_BUDGET:
        raise MemoryError(f"some {need / report.GIB:.1f} GiB, {CPU_BUDGET / report.GIB:.0f} allowed")
    rows = _rows_for(session, baseline, contest, contest.rows).with_grad()
    theirs = timing.loss_and_gradient(lambda: baseline.loss(rows), rows.embeddings, len(rows))
    laps, memory = in_turn(session, {"theirs": theirs, "ours": session.work(rows)}, contest.dtype)
    times = {name: [sum(lap) for lap in laps[name]] for name in ("theirs", "ours")}
    record = session.journal.add(
        "baseline",
        name=baseline.name,
        family=baseline.family,
        mix=baseline.mix,
        rows=contest.rows,
        width=contest.width,
        dtype=gate.dtype_name(contest.dtype),
        theirs_ms=timing.spread(times["theirs"]),
        ours_ms=timing.spread(times["ours"]),
        speedup=timing.spread(t / o for t, o in zip(times["theirs"], times["ours"], strict=True)),
        extra_memory_multiple=_multiple(memory["theirs"], contest),
        rounds=len(times["ours"]),
        laps_ms=times,
        **errors,
    )
    session.say(report.contest_text(record))


def time_large(session: Session, large: Large) -> None:
    """One forward and backward, whose peak memory is that of a process that does nothing else."""
    result = timing.in_new_process(large_run, *large, session.implementation, torch.get_num_threads())
    record = session.journal.add("large", **large._asdict(), **result)
    session.say(f"N {large.rows:,}: {report.large_text(record)}")


def large_run(rows: int, width: int, implementation: str, threads: int) -> dict:
    torch.set_num_threads(threads)
    drawn = make_rows("realistic", rows, width, torch.float32, torch.device("cpu")).with_grad()
    begin = time.perf_counter()
    measured_loss(drawn, implementation).backward()
    return {"seconds": time.perf_counter() - begin}


def _rows_for(session: Session, baseline: Baseline, contest: Contest, count: int) -> Rows:
    rows = make_rows(baseline.mix, count, contest.width, contest.dtype, session.device)
    return replace(rows, identity_weight=baseline.identity_weight, label_weight=baseline.label_weight)


def _multiple(memory: int | None, step: Block | Contest) -> float | None:
    return None if memory is None else memory / (step.rows * step.width * step.dtype.itemsize)


def _free_memory(session: Session) -> None:
    gc.collect()
    with contextlib.suppress(RuntimeError):  # a GPU that has faulted frees nothing; the summary is wanted all the same
        if session.stopwatch.on_gpu:
            torch.cuda.empty_cache()


def _name(step: Block | Contest | Large) -> str:
    name = step.baseline if isinstance(step, Contest) else type(step).__name__.lower()
    return f"{name} at N {step.rows:,}, D {step.width}"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


if __name__ == "__main__":
    sys.exit(main())
