"""Seconds from the loss of a host to the next step on what is left, and from its return to the next step on all.

python benchmarks/faults/run.py                    the table, a few minutes; two hosts as network namespaces, as root
python benchmarks/faults/run.py --out FILE         and into FILE

`mixcl launch hosts` runs a real pre-training of a phantom on two hosts, a rank on each, over gloo. The first host, at
which the ranks meet and whose rank writes, is cut off (its link is down, nothing is told to anybody) or killed (all its
processes end at once), and comes back; so again and again. Every step is logged: a fault's end is the first step in the
log of the ranks that went on.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from machines import Machines, machines, missing

from mixcl_dist.config import load
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.errors import RunError
from mixcl_dist.phantom import write_cohort
from mixcl_dist.records import METRICS, PretrainRecord, read_metrics
from mixcl_dist.run import machine

TIMEOUT_S = 15
"""`engine.timeout_s`: how long a rank waits for another before it gives it up for lost."""
BAR_S = 60.0
PATIENCE_S = 240.0
SMALL = {
    "network.filters": "4,6,8", "network.voxel_dim": "8", "network.crop_dim": "8", "views.size": "16,16,16",
    "rows.per_view_pair": "32", "data.workers": "0", "pretrain.batch_size": "4", "pretrain.steps": "1000000",
    "pretrain.log_every": "1", "pretrain.gradient_norms_every": "0", "pretrain.sample_every": "1000000",
    "checkpoint.every": "10", "engine.timeout_s": str(TIMEOUT_S),
}  # fmt: skip


class Seconds(NamedTuple):
    fault: str
    to_next_step: float
    """On the hosts that are left."""
    done_again: int
    """Steps that were taken since the checkpoint."""
    back_to_all: float
    """From the host's return to the next step on all."""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3, help="of each fault (default 3)")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    if reason := missing():
        sys.exit(f"faults: {reason}")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, machines() as hosts:
        table = tabulated(list(measured(hosts, Path(folder), given.rounds)))
    print(table, end="")
    if given.out:
        given.out.write_text(table)
    return 0


def measured(hosts: Machines, folder: Path, rounds: int) -> Iterator[Seconds]:
    """Faults in turns, while one job goes on."""
    faults: dict[str, tuple[Callable[[str], None], Callable[[str], None]]] = {
        "cut off": (hosts.cut_off, hosts.connect),
        "killed": (hosts.kill, hosts.start),
    }
    first, total = hosts.names[0], len(hosts.names)
    with running(hosts, folder) as run:
        for (name, (strike, mend)), _ in itertools.product(faults.items(), range(rounds)):
            wait_for_steps(run, 15)
            before, begin = last_step(run), time.monotonic()
            strike(first)
            wait_for_turn(run, total - 1)
            to_next, again = time.monotonic() - begin, before - newest_checkpoint(run)
            wait_for_steps(run, 5)
            begin = time.monotonic()
            mend(first)
            wait_for_turn(run, total)
            one = Seconds(name, to_next, again, time.monotonic() - begin)
            print(f"{name}: {one.to_next_step:.0f} s, back after {one.back_to_all:.0f} s", file=sys.stderr)
            yield one


@contextmanager
def running(hosts: Machines, folder: Path) -> Iterator[Path]:
    """The folder of a pre-training on all hosts, which goes on as long as the block."""
    shards = made_shards(folder)
    launch = [sys.executable, "-m", "mixcl_dist", "launch", "hosts", "--hosts", ",".join(hosts.names), "--failures=99"]
    pretrain = ["pretrain", "--data", shards, "--run", folder / "run", *words(SMALL)]
    with (folder / "log").open("wb") as log:
        job = subprocess.Popen([*launch, "--", *pretrain], env=hosts.environment, stdout=log, stderr=log)
        try:
            wait(lambda: job.poll() is not None or last_step(folder / "run") > 0, "no step was taken")
            if job.returncode is not None:
                raise TimeoutError(f"the job ended with {job.returncode}")
            yield folder / "run"
        except TimeoutError:
            sys.stderr.write((folder / "log").read_text()[-4000:])
            raise
        finally:
            job.terminate()
            job.wait()


def made_shards(folder: Path) -> Path:
    cohort = write_cohort(folder / "cohort", training=4, validation=0, unlabelled=2, size=(40, 34, 40), spacing_mm=9.0)
    build(cohort, folder / "shards", load(overrides=[("build.patch_size", "24,24,24")]).build)
    return folder / "shards"


def words(settings: dict[str, str]) -> list[str]:
    """As they are given on a command line."""
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def wait_for_turn(run: Path, ranks: int) -> None:
    """Wait until another turn of the job has begun, by so many ranks, and has logged a step."""
    before = _log_file(run)
    wait(
        lambda: _log_file(run) != before and _ranks(run) == ranks and last_step(run) > newest_checkpoint(run),
        f"no turn of {ranks} ranks took a step",
    )


def wait_for_steps(run: Path, steps: int) -> None:
    goal = last_step(run) + steps
    wait(lambda: last_step(run) >= goal, f"step {goal} was not taken")


def wait(reached: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError(f"{otherwise} within {PATIENCE_S:g} s")
        time.sleep(0.1)


def _log_file(run: Path) -> int | None:
    """Which file the metrics are: a turn begins with another, without what it does again."""
    path = run / METRICS
    return path.stat().st_ino if path.exists() else None


def _ranks(run: Path) -> int | None:
    try:
        return PretrainRecord.load(run).world_size
    except RunError:  # not begun
        return None


def last_step(run: Path) -> int:
    logged = read_metrics(run / METRICS) if (run / METRICS).exists() else []
    return logged[-1]["step"] if logged else 0


def newest_checkpoint(run: Path) -> int:
    return max((int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*")), default=0)


def tabulated(found: list[Seconds]) -> str:
    on = machine()
    lines = [
        f"Loss of the first of two hosts; engine.timeout_s {TIMEOUT_S}, checkpoint.every {SMALL['checkpoint.every']}",
        f"{on.cpu}, {on.cores} cores for both hosts; seconds, median (least to most)",
        "",
        f"{'host is':<10} rounds  to next step on one     back, to next step on two   steps done again",
    ]
    for fault in dict.fromkeys(one.fault for one in found):
        of = [one for one in found if one.fault == fault]
        to_next, back = spread([one.to_next_step for one in of]), spread([one.back_to_all for one in of])
        again = spread([one.done_again for one in of])
        lines.append(f"{fault:<10} {len(of):>6}  {to_next:<22}  {back:<26}  {again}")
    median = statistics.median(one.to_next_step for one in found)
    lines += ["", f"median of all {median:.0f} s: {'within' if median <= BAR_S else 'ABOVE'} the bar of {BAR_S:g} s"]
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    sys.exit(main())
