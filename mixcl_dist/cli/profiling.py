"""`mixcl benchmark` and `plan`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixcl_dist.cli.verbs import add_verb, check_file, config_of, positive


def add_profiling(verbs: Any) -> None:
    summary = "where does a pre-training step lose its time here, on these shards?"
    example = "mixcl benchmark --data shards --out now.json --against before.json"
    add = add_verb(verbs, "benchmark", _benchmark, summary, example)
    add("--data", required=True, metavar="SHARDS", help="folder made by `mixcl shards build`, or its URL")
    add("--out", type=Path, metavar="RESULT.json", help="file to write, with all samples; and a page beside it, .html")
    against = "an earlier result, to compare with; the exit code is 1 where a figure has become worse"
    add("--against", type=Path, action="append", default=[], metavar="RESULT.json", help=against)
    add("--smallest", type=_share, metavar="SHARE", help="change of a median that matters (default 0.05)")
    add("--seconds", type=_seconds, default=60.0, metavar="S", help="to measure for, beside starts (default 60)")
    add("--trace", type=Path, metavar="FILE.json", help="leave a trace of ten more steps, for ui.perfetto.dev")

    summary = "how far does a pre-training come on N GPUs in H hours, and what does it need?"
    example = "mixcl plan --data shards --gpus 64 --hours 24 --out plan.json --pretrain.batch_size 512"
    add = add_verb(verbs, "plan", _plan, summary, example)
    add("--data", required=True, metavar="SHARDS", help="folder made by `mixcl shards build`, or its URL")
    add("--gpus", type=positive, required=True, metavar="N", help="in all; processes where this machine has no GPU")
    add("--hours", type=_hours, required=True, metavar="H", help="that there are")
    per_node = "GPUs of a machine (default: as many as this one has, or as it has cores for a process each)"
    add("--gpus-per-node", type=positive, metavar="N", help=per_node)
    network = "Gbit/s of a machine's link to the others, which is assumed (default 100)"
    add("--network-gbit", type=_gbit, default=100.0, metavar="G", help=network)
    add("--seconds", type=_seconds, default=100.0, metavar="S", help="to measure for, beside starts (default 100)")
    add("--out", type=Path, metavar="PLAN.json", help="file to write, for mixcl pretrain --plan")


def _benchmark(options: argparse.Namespace) -> int:
    from mixcl_dist.profiling import compare, step

    for name in ("out", "trace"):
        check_file(options, name)
    results = [compare.read(path, step.BENCHMARK) for path in options.against]  # before anything takes minutes
    command = ("mixcl", "benchmark", *(f"--{key} {value}" for key, value in options.overrides))
    result = step.benchmark(
        config_of(options), options.data, seconds=options.seconds, trace=options.trace, command=command
    )
    print(step.table(result))
    print(result.said)
    names = [path.name for path in options.against]
    if options.out:
        result.write(options.out)
        names, page = [*names, options.out.name], options.out.with_suffix(".html")
        compare.write_page([*results, result], names, options.smallest or compare.SMALLEST, page)
        print(f"result in {options.out}; page: {page}")
    if not results:
        return 0
    smallest = options.smallest or compare.SMALLEST
    print(compare.text([*results, result], smallest))
    return int(bool(compare.worse(results[0], result, smallest)))


def _plan(options: argparse.Namespace) -> None:
    from mixcl_dist.profiling import plan

    check_file(options, "out")
    cluster = plan.Cluster(options.gpus, options.gpus_per_node or plan.room(), options.network_gbit)
    found = plan.plan(config_of(options), options.data, cluster, hours=options.hours, seconds=options.seconds)
    print(plan.told(found))
    if options.out:
        found.write(options.out)
        print(f"plan in {options.out}; next: mixcl pretrain --plan {options.out} --pretrain.steps {_steps(found)} …")


def _steps(found: Any) -> int:
    """That fit also where steps take as long as they may."""
    return max(1, int(found.steps.low))


def _number(text: str, what: str, fits: Callable[[float], bool], cure: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text} is no {what}; give {cure}")
    return value


def _seconds(text: str) -> float:
    return _number(text, "number of seconds", lambda value: 0 <= value <= 86_400, "0 to 86400")


def _hours(text: str) -> float:
    return _number(text, "number of hours", lambda value: 0 < value <= 87_600, "more than 0, at most 87600")


def _gbit(text: str) -> float:
    return _number(text, "rate in Gbit/s", lambda value: 0 < value <= 1e6, "more than 0, as 100")


def _share(text: str) -> float:
    return _number(text, "share", lambda value: 0 < value < 1, "one between 0 and 1, as 0.05")
