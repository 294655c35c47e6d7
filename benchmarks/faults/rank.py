"""Seconds from the death of one of two ranks to the end of the other, which nothing but its watchdog tells.

python benchmarks/faults/rank.py                   the table, a few minutes
python benchmarks/faults/rank.py --out FILE        and into FILE

Two processes of `mixcl pretrain` on a phantom, over gloo and without a launcher, which would end both. Rank 1 and rank
0, at which they meet and which writes, are killed in turns; then frozen in turns, as on a machine that is cut off.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from run import PATIENCE_S, SMALL, last_step, made_shards, spread, wait, words

from mixcl_dist.run import machine

BAR_S = 30.0
STEPS_BEFORE = 5
FAULTS = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=4, help="of each fault (default 4)")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        table = tabulated(dict(measured(Path(folder), given.rounds)))
    print(table, end="")
    if given.out:
        given.out.write_text(table)
    return 0


def measured(folder: Path, rounds: int) -> Iterator[tuple[str, list[float]]]:
    """Each fault and its seconds, ranks in turns."""
    shards = made_shards(folder)
    for name, fault in FAULTS.items():
        yield name, [ended_after(fault, n % 2, shards, folder / f"{name}-{n}") for n in range(rounds)]


def ended_after(fault: signal.Signals, lost: int, shards: Path, run: Path) -> float:
    """Seconds from the fault of the rank `lost` to the end of the other one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mixcl_dist", "pretrain", "--data", shards, "--run", run, *words(SMALL)]
    ranks = []
    with run.with_suffix(".log").open("wb") as log:
        for rank in range(2):
            environment = os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        wait(lambda: last_step(run) >= STEPS_BEFORE, f"step {STEPS_BEFORE} was not taken")
        begin = time.monotonic()
        ranks[lost].send_signal(fault)
        code = ranks[1 - lost].wait(PATIENCE_S)
        took = time.monotonic() - begin
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    if code == 0:
        sys.exit(f"faults: rank {1 - lost} ended as if nothing had happened")
    print(f"rank {lost} {fault.name}: {took:.1f} s", file=sys.stderr)
    return took


def tabulated(found: dict[str, list[float]]) -> str:
    on = machine()
    lines = [
        "Loss of one of two ranks without a launcher; seconds to the end of the other, median (least to most)",
        f"{on.cpu}, {on.cores} cores for both ranks; rank 1 and rank 0 in turns",
        "",
        "rank is    rounds  seconds",
        *(f"{name:<10} {len(took):>6}  {spread(took)}" for name, took in found.items()),
    ]
    most = max(max(took) for took in found.values())
    lines += ["", f"longest {most:.0f} s: {'within' if most <= BAR_S else 'ABOVE'} the bar of {BAR_S:g} s"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
