"""Every benchmark of this folder by name, with one form of result.

    python -m benchmarks list
    python -m benchmarks launches --out launches.json
    python -m benchmarks shards --out now.json --against before.json     with a page beside it, now.html
    python -m benchmarks stream --quick --out quick.json -- --baselines VENV     what follows -- is the benchmark's own
    python -m benchmarks compare before.json now.json later.json --page page.html
    python -m benchmarks gate                                            counts alone, as CI holds them

Run from the repository's root. The exit code is 1 where a figure has become worse than in `--against`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixcl_dist.errors import RunError
from mixcl_dist.profiling import compare
from mixcl_dist.profiling.result import Figure, Result, ended, environment

FOLDER = Path(__file__).resolve().parent
GATES = (
    ("launches/run.py", "--check"),
    ("kernel/builds.py", "--only", "sm_90", "bf16", "128", "narrow"),  # what a training launches; all take minutes
)


class Benchmark(NamedTuple):
    """A program of this folder."""

    what: str
    program: str
    figures: Callable[[Path], Mapping[str, Figure]]
    """Reads what the program left in its `--out`."""
    quick: tuple[str, ...] = ("--quick",)
    said: Callable[[Path], str] = lambda out: ""
    """Of the same, a sentence for people."""


def of_launches(out: Path) -> dict[str, Figure]:
    figures = {}
    with (out / "launches.csv").open() as file:
        for row in csv.DictReader(file):
            for kind in ("launches", "waits", "bytes"):
                figures[f"{row['stage']}: {kind}"] = Figure(
                    unit=kind, better="less", samples=(float(row[kind]),), exact=True
                )
    return figures


def of_shards(out: Path) -> dict[str, Figure]:
    contestants = json.loads((out / "build.json").read_bytes())["contestants"]
    return {
        name: Figure(unit="volumes/min", better="more", samples=tuple(row["volumes_per_minute"]["samples"]))
        for name, row in contestants.items()
    }


def of_stream(out: Path) -> dict[str, Figure]:
    return {
        f"{row['name']}, {row['workers']} workers, batch {row['batch_size']}": Figure(
            unit="patches/s", better="more", samples=tuple(row["patches_per_second"])
        )
        for row in json.loads((out / "results.json").read_bytes())["timings"]
    }


def of_kernel(out: Path) -> dict[str, Figure]:
    figures = {}
    for line in (out / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        label = " ".join(str(row[key]) for key in ("name", "mix", "rows", "width", "dtype") if key in row)
        for name, laps in row.get("laps_ms", {}).items():
            figures[f"{label}: {name}"] = Figure(unit="ms", better="less", samples=tuple(laps))
    return figures


def of_views(out: Path) -> dict[str, Figure]:
    return {
        f"{row['name']}, {row['work']}, {row['patch']}³ to {row['view']}³, {row['device']}": Figure(
            unit="patches/s", better="more", samples=tuple(row["patches_per_second"])
        )
        for row in json.loads((out / "results.json").read_bytes())["timings"]
    }


def of_scaling(out: Path) -> dict[str, Figure]:
    """Computed, not measured, so any difference is one."""
    return {
        name: Figure(unit="efficiency", better="more", samples=(value,), exact=True)
        for name, value in json.loads((out / "scaling.json").read_bytes()).items()
    }


def of_tune(out: Path) -> dict[str, Figure]:
    figures = {}
    for name, runs in json.loads((out / "results.json").read_bytes())["runs"].items():
        for key, unit in (("overhead_s", "s a trial"), ("memory_growth_mb", "MB")):
            figures[f"{name}: {key}"] = Figure(unit=unit, better="less", samples=tuple(run[key] for run in runs))
    return figures


def of_result(out: Path) -> Mapping[str, Figure]:
    return Result.load(out).figures


def said_of_result(out: Path) -> str:
    return Result.load(out).said


BENCHMARKS = {
    "kernel": Benchmark("the loss: right, how fast, how much memory, against what", "kernel/run.py", of_kernel),
    "launches": Benchmark("launches, waits and memory of a step, counted on a CPU", "launches/run.py", of_launches, ()),
    "scaling": Benchmark("efficiency at 8 to 1,024 GPUs, predicted", "scaling/run.py", of_scaling, ()),
    "shards": Benchmark("volumes a minute into shards, beside MONAI", "shards/build.py", of_shards),
    "step": Benchmark("a pre-training step by part, beside its floors", "step/run.py", of_result, said=said_of_result),
    "stream": Benchmark("patches a second to the trainer, beside other loaders", "stream/run.py", of_stream),
    "time_to_dice": Benchmark(
        "from an empty folder to a Dice on OpenKBP", "time_to_dice/run.py", of_result, said=said_of_result
    ),
    "tune": Benchmark("what a trial costs the driver of a study", "tune/run.py", of_tune, ("--trials", "8")),
    "views": Benchmark("two views of a patch, beside MONAI and others", "views/run.py", of_views),
}
ELSEWHERE = {
    "ranks": "benchmarks/ranks/", "gpu": "benchmarks/gpu/run.py", "variants": "benchmarks/variants/run.py",
    "table": "mixcl table",
}  # fmt: skip
"""Those that keep a form of result of their own."""


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    own = given[given.index("--") + 1 :] if "--" in given else []
    options = _parser().parse_args(given[: given.index("--")] if "--" in given else given)
    try:
        if options.verb == "list":
            return _list()
        if options.verb == "gate":
            return _gate()
        if options.verb == "compare":
            return _compare(options.results, options.smallest, options.page)
        return _measure(options, own)
    except (RunError, ValueError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="what there is")
    verbs.add_parser("gate", help="fail where a stage has more launches, waits or bytes, or a kernel more instructions")
    side = verbs.add_parser("compare", help="results side by side; fail where a figure is worse than in the first")
    side.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    side.add_argument("--page", type=Path, help="an HTML page of them")
    measured = [verbs.add_parser(name, help=benchmark.what) for name, benchmark in BENCHMARKS.items()]
    for verb in measured:
        verb.add_argument("--quick", action="store_true", help="smallest sizes: does everything work here?")
        verb.add_argument("--out", type=Path, required=True, metavar="RESULT.json")
        verb.add_argument("--against", type=Path, action="append", default=[], metavar="RESULT.json")
    for verb in (side, *measured):
        verb.add_argument("--smallest", type=float, default=compare.SMALLEST, help="share that matters (%(default)s)")
    return parser


def _gate() -> int:
    """Every count, also after one that has grown; the exit code is 1 if one has."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    codes = [
        subprocess.run([sys.executable, FOLDER / program, *arguments], env=variables).returncode
        for program, *arguments in GATES
    ]
    return int(any(codes))


def _list() -> int:
    for name, benchmark in BENCHMARKS.items():
        print(f"{name:<12} {benchmark.what} (benchmarks/{benchmark.program})")
    for name, where in ELSEWHERE.items():
        print(f"{name:<12} see {where}")
    return 0


def _measure(options: argparse.Namespace, own: list[str]) -> int:
    for path in options.against:
        compare.read(path, options.verb)  # refused before anything takes minutes
    benchmark, here = BENCHMARKS[options.verb], environment()
    with tempfile.TemporaryDirectory() as folder:
        command = [benchmark.program, "--out", folder, *(benchmark.quick if options.quick else ()), *own]
        code = subprocess.run([sys.executable, FOLDER / command[0], *command[1:]]).returncode
        if code:
            raise ValueError(f"{benchmark.program} ended with exit code {code}; see what it said above")
        figures, sentence = benchmark.figures(Path(folder)), benchmark.said(Path(folder))
        kept = Result.load_if_there(Path(folder))
    result = Result(
        benchmark=options.verb,
        command=tuple("OUT" if word == folder else word for word in command),
        quick=options.quick,
        environment=ended(here),
        conditions=kept.conditions if kept else {},
        figures=figures,
        said=sentence,
    )
    result.write(options.out)
    print(options.out)
    return _compare([*options.against, options.out], options.smallest, options.out.with_suffix(".html"))


def _compare(paths: list[Path], smallest: float, page: Path | None) -> int:
    first, *others = paths
    before = Result.read(first)
    results = [before, *(compare.read(path, before.benchmark) for path in others)]
    print(compare.text(results, smallest))
    if page:
        compare.write_page(results, [path.name for path in paths], smallest, page)
        print(page)
    lost = [name for other in results[1:] for name in compare.worse(results[0], other, smallest)]
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
