"""Measure everything that a GPU is wanted for, in a bounded time, going on where an earlier run ended.

    python benchmarks/gpu/run.py check kernel step --out OUT --seconds 500
    python benchmarks/gpu/run.py tiles table       --out OUT --seconds 330

On a bare machine (Python 3.12, torch, triton, no network), with the pack that `make gpu-pack` made. What the committed
results (benchmarks/results/gpu) or an earlier run to OUT hold for this card and these sources is not measured again;
what is missing comes first, then what is stale, then what failed. Every item is recorded as soon as it is known. The
exit code is 1 where something is wrong; what there was no time for is listed as missing, and is no error.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pack
import stages

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    begin = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.pack.exists():
        pack.unpack(options.pack, options.work)
    sys.path[:0] = [str(ROOT), str(options.work / "site")]
    import work_queue  # not before, as it needs packages that a bare machine has in the pack alone

    return work_queue.measure(options, begin)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=stages.NAMES, metavar="STAGE", help=", ".join(stages.NAMES))
    parser.add_argument("--out", type=Path, required=True, help="folder of what is kept")
    parser.add_argument("--seconds", type=float, required=True, help="for everything")
    parser.add_argument("--work", type=Path, default=Path("/tmp/mixcl-gpu"), help="folder for the rest (%(default)s)")
    parser.add_argument("--pack", type=Path, default=ROOT / ".pack", help="(%(default)s)")
    results = ROOT / "benchmarks" / "results" / "gpu"
    parser.add_argument("--results", type=Path, default=results, help="earlier results (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes on the CPU: does everything run?")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
