"""What was measured: a line of JSON each as soon as it is known, and at the end tables and bars a person can read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

GIB = 2**30
ROWS, WIDTH, LARGEST, MIX = 65_536, 128, 1_048_576, "realistic"  #: where the bars are set
CPU_ROWS = 200_000
DENSE_EAGER = ("reference", "dense eager")


class Journal:
    """The records of this run; each is appended to ``results.jsonl`` at once."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "results.jsonl").open("a", encoding="utf-8")
        self.records: list[dict] = []

    def add(self, kind: str, **fields: object) -> dict:
        record = {"kind": kind, **fields}
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        return record

    def select(self, kind: str, **fields: object) -> list[dict]:
        """Records of a kind that hold these values."""
        wanted = {"kind": kind} | fields
        return [r for r in self.records if all(name in r and r[name] == value for name, value in wanted.items())]


def read(folder: Path) -> list[dict]:
    """The records of an earlier run, without a last one that was cut short."""
    *lines, _unfinished = (folder / "results.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


class Bar(NamedTuple):
    """A figure that was promised, and what came of it."""

    name: str
    figure: str
    met: bool | None  #: None where it was not measured

    @property
    def verdict(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]


def bars(journal: Journal, device_type: str) -> list[Bar]:
    return list(_gpu_bars(journal) if device_type == "cuda" else _cpu_bars(journal))


def _gpu_bars(journal: Journal) -> Iterator[Bar]:
    point = journal.select("timing", rows=ROWS, width=WIDTH, mix=MIX)
    half = [record for record in point if record["dtype"] in ("fp16", "bf16")]
    best = min(half, key=lambda record: record["both_ms"][0], default=None)
    where = f"N {ROWS:,}, D {WIDTH}, {MIX}, {best['dtype'] if best else 'fp16 or bf16'}"
    both = best["both_ms"][0] if best else None
    yield _bar(f"forward + backward ≤ 6.4 ms ({where})", both, "{:.2f} ms", at_most=6.4)
    yield _bar("the same ≤ 5.4 ms (stretch)", both, "{:.2f} ms", at_most=5.4)
    share = 100 * best["share"][0] if best else None
    yield _bar("the same ≥ 65 % of the matmul peak", share, "{:.1f} %", at_least=65)
    masking = journal.select("masking", rows=ROWS, width=WIDTH, dtype=best["dtype"]) if best else []
    cost = 100 * (masking[0]["ratio"][0] - 1) if masking else None
    yield _bar("label masking costs ≤ 10 %", cost, "{:+.1f} %", at_most=10)
    yield _speedup_bar(journal, ("dense", "inf-cl"), 10)
    yield _speedup_bar(journal, ("chunked",), 1.8)
    memory = max((record["extra_memory_multiple"] for record in half), default=None)
    yield _bar("extra memory ≤ 4× the embeddings", memory, "{:.2f}×", at_most=4)
    sizes = [record["rows"] for record in journal.select("timing")]
    tried = any(f"N {LARGEST:,}" in record["what"] for record in journal.select("skipped")) or LARGEST in sizes
    yield _bar(f"N = {LARGEST:,} runs", max(sizes) if tried else None, "{:,} is the largest that ran", at_least=LARGEST)
    yield _converged_bar(journal)


def _cpu_bars(journal: Journal) -> Iterator[Bar]:
    dense = [record for record in journal.select("baseline") if record["name"] in DENSE_EAGER and record["rows"] >= 512]
    closest = min(dense, key=lambda record: record["speedup"][0], default=None)
    name = "never slower than dense eager from N = 512 on"
    yield _bar(name, *_speedup(closest, "{:.2f}×"), at_least=1)
    large = journal.select("large", rows=CPU_ROWS)
    peak = large[0]["peak_bytes"] / GIB if large and large[0]["peak_bytes"] else None
    yield _bar(f"peak memory < 2 GiB at N = {CPU_ROWS:,}", peak, "{:.2f} GiB, Python and torch included", at_most=2)
    yield _converged_bar(journal)


def _speedup_bar(journal: Journal, families: tuple[str, ...], least: float) -> Bar:
    """Against the fastest: the baseline that is least behind, each at the largest N where it fits."""
    records = [record for record in journal.select("baseline") if record["family"] in families]
    fastest = min(records, key=lambda record: record["speedup"][0], default=None)
    name = f"≥ {least}× as fast as the fastest of {' and '.join(families)}"
    return _bar(name, *_speedup(fastest, "{:.1f}×"), at_least=least)


def _speedup(record: dict | None, style: str) -> tuple[float | None, str]:
    if record is None:
        return None, ""
    return record["speedup"][0], f"{style} as fast as {record['name']} at N {record['rows']:,}"


def _converged_bar(journal: Journal) -> Bar:
    worst = max((100 * record["gradient_error"] for record in journal.select("gate", mass=0.99)), default=None)
    return _bar("gradient error ≤ 0.5 % at positive mass 0.99", worst, "{:.3f} % at worst", at_most=0.5)


def _bar(name: str, value: float | None, style: str, *, at_most: float = math.inf, at_least: float = -math.inf) -> Bar:
    return Bar(name, "–", None) if value is None else Bar(name, style.format(value), at_least <= value <= at_most)


def summary(journal: Journal, device_type: str) -> str:
    """All tables, in Markdown."""
    machine = journal.records[0]
    gate = journal.select("gate")
    passed = len(journal.select("gate", passed=True))
    lines = [
        "# The mixed contrastive loss, measured",
        "",
        f"{machine['device']}; torch {machine['torch']}, triton {machine['triton']}, Python {machine['python']}; "
        f'implementation "{machine["implementation"]}"; {machine["date"]}.',
        "",
        "FLOP are 6·N²·D, 2 of them in the forward. Shares are of the best large matmul in the same dtype, measured in "
        "the same rounds. Times are medians (least to greatest) of the rounds; memory is the peak beyond what was "
        "allocated before, in multiples of the embeddings. Baselines are timed in turn with the kernel, ratios taken "
        "round by round.",
        "",
        "## Bars",
        "",
        *table(["bar", "figure", ""], [[bar.name, bar.figure, bar.verdict] for bar in bars(journal, device_type)]),
        "",
        f"## Correctness: {passed} of {len(gate)} cases pass",
        "",
        *table(["case", "dtype", "cases", "worst loss error", "worst gradient error", "same bits"], _gate_rows(gate)),
        "",
        "## The kernel",
        "",
        *table(
            ["mix", "N", "D", "dtype", "forward ms", "backward ms", "both ms", "TFLOP/s", "of matmul", "extra memory"],
            map(_timing_row, journal.select("timing")),
        ),
        "",
        *table(
            ["N", "D", "dtype", "realistic / InfoNCE of the same kernel"],
            [[*_size(record), spread_text(record["ratio"], "{:.3f}")] for record in journal.select("masking")],
        ),
        "",
        "## Baselines",
        "",
        *table(
            ["baseline", "mix", "N", "D", "dtype", "ms", "ours ms", "ours is faster by", "gradient error", "memory"],
            map(_baseline_row, journal.select("baseline")),
        ),
    ]
    lines += [f"\nN {r['rows']:,}: {large_text(r)}." for r in journal.select("large")]
    skipped = [f"- {r['what']}: {r['why']}" for r in journal.select("skipped")]
    return "\n".join(lines + (["", "## Left out", "", *skipped] if skipped else [])) + "\n"


def table(head: list[str], rows: Iterable[list]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]


def _gate_rows(gate: list[dict]) -> Iterator[list]:
    for key in dict.fromkeys((record["case"], record["dtype"]) for record in gate):
        group = [record for record in gate if (record["case"], record["dtype"]) == key]
        worst = [max(record.get(name, float("nan")) for record in group) for name in ("loss_error", "gradient_error")]
        bits = all(record.get("same_bits") for record in group)
        yield [*key, len(group), *(f"{value:.1e}" for value in worst), "yes" if bits else "NO"]


def _size(record: dict) -> list[str]:
    return [f"{record['rows']:,}", str(record["width"]), record["dtype"]]


def _timing_row(record: dict) -> list:
    head = [record["mix"], *_size(record)]
    times = [spread_text(record[f"{lap}_ms"]) for lap in ("forward", "backward", "both")]
    share = f"{100 * record['share'][0]:.0f} %"
    return [*head, *times, f"{record['teraflops']:.3g}", share, memory_text(record)]


def _baseline_row(record: dict) -> list:
    head = [record["name"], record["mix"], *_size(record)]
    speedup = spread_text(record["speedup"], "{:.2f}×")
    error = f"{100 * record['gradient_error']:.2g} %"
    times = [spread_text(record[name]) for name in ("theirs_ms", "ours_ms")]
    return [*head, *times, speedup, error, memory_text(record)]


def worst_errors(gate: list[dict]) -> str:
    apart = [record for record in gate if record["mass"] is None]
    near = [record for record in gate if record["mass"] is not None]
    loss, gradient = (max(record[f"{name}_error"] for record in apart) for name in ("loss", "gradient"))
    converged = max(record["gradient_error"] for record in near)
    return f"worst errors: loss {loss:.1e}, gradient {gradient:.1e}, gradient near convergence {converged:.1e}"


def timing_text(record: dict) -> str:
    """One line of what :func:`run.time_block` measured for a mix."""
    forward, backward, both = (record[f"{lap}_ms"] for lap in ("forward", "backward", "both"))
    return (
        f"{record['mix']}, N {record['rows']:,}, D {record['width']}, {record['dtype']}: forward {forward[0]:.3g} + "
        f"backward {backward[0]:.3g} = {spread_text(both)} ms, {record['teraflops']:.3g} TFLOP/s, "
        f"{100 * record['share'][0]:.1f} % of matmul, extra memory {memory_text(record)}"
    )


def contest_text(record: dict) -> str:
    return (
        f"{record['name']} on {record['mix']}, N {record['rows']:,}: {record['theirs_ms'][0]:.4g} ms, ours "
        f"{record['ours_ms'][0]:.4g} ms, faster by {spread_text(record['speedup'], '{:.2f}×')}; its gradient error "
        f"{100 * record['gradient_error']:.2g} %, its memory {memory_text(record)}"
    )


def memory_text(record: dict) -> str:
    return "–" if record["extra_memory_multiple"] is None else f"{record['extra_memory_multiple']:.2f}×"


def large_text(record: dict) -> str:
    memory = f"{record['peak_bytes'] / GIB:.2f} GiB" if record["peak_bytes"] else "unknown here"
    return f"forward + backward {record['seconds']:.1f} s in a process of its own, its peak memory {memory}"


def spread_text(values: list[float], style: str = "{:.3g}") -> str:
    median, least, greatest = map(style.format, values)
    return f"{median} ({least} to {greatest})"
