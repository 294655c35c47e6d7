"""A pre-training whose processes are killed at random moments and go on from what they left, again and again.

`python killed.py RANKS,RANKS,… KILLS SEED -- pretrain …` prints, as JSON, how many ranks each kill hit, and how many of
the kills found a checkpoint half written. Start k has the k-th number of ranks, over and over; one rank after the
other is hit, then all together. All processes are forked from one that has imported everything, as imports would take
most of the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from deepspeed import comm  # noqa: F401 - imported here once for all

from mixcl_dist import precision
from mixcl_dist.cli import main
from mixcl_dist.pretraining import pretrain  # noqa: F401

sys.path.append(str(Path(__file__).resolve().parents[2]))
from ports import free_port

precision.has_bfloat16 = lambda device: False  # its rounding depends on how many patches are convolved at once
ENDS_S = 400


def fork(ranks: int, words: list[str]) -> list[int]:
    port = free_port()
    found = []
    for rank in range(ranks):
        process = os.fork()
        if not process:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in group.items()}
            torch.set_num_threads(1)
            os._exit(main(words))
        found.append(process)
    return found


def published(run: Path) -> set[str]:
    return {path.name for path in run.glob("checkpoints/step_*")}


def is_saving(run: Path) -> bool:
    return any(run.glob("checkpoints/.step_*.tmp"))


def wait_to_kill(run: Path, rng: random.Random) -> None:
    """Until one or two checkpoints more are published, and then a moment, in which a fast machine takes a few steps."""
    before, wanted = published(run), rng.randint(1, 2)
    end = time.monotonic() + ENDS_S
    while len(published(run) - before) < wanted and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))


def stop_while_saving(run: Path, writer: int, rng: random.Random) -> None:
    """Suspend `writer` in the middle of a save: however busy the machine is, it is still there when it is killed."""
    end = time.monotonic() + ENDS_S
    while time.monotonic() < end:
        if not is_saving(run):
            continue
        time.sleep(rng.uniform(0, 0.005))
        os.kill(writer, signal.SIGSTOP)
        os.waitpid(writer, os.WUNTRACED)  # until it stands still
        if is_saving(run):
            return
        os.kill(writer, signal.SIGCONT)


def ended(processes: list[int]) -> list[int]:
    """Exit codes, negative for a signal; ends those that do not end."""
    codes, end = {}, time.monotonic() + ENDS_S
    while len(codes) < len(processes):
        for process in set(processes) - codes.keys():
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                codes[process] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                sys.exit(f"process {process} did not end within {ENDS_S} s of another's death")
        time.sleep(0.01)
    return [codes[process] for process in processes]


def run(ranks_of_starts: list[int], kills: int, seed: int, words: list[str]) -> dict[str, int]:
    folder, rng, counted = Path(words[words.index("--run") + 1]), random.Random(seed), Counter()
    for number in range(kills + 1):
        ranks = ranks_of_starts[number % len(ranks_of_starts)]
        goes_on = (folder / "run.json").exists()
        processes = fork(ranks, [*words[: 1 + words.index("--run") + 1], "--resume", "latest"] if goes_on else words)
        if number < kills:
            wait_to_kill(folder, rng)
            if number % 2:
                stop_while_saving(folder, processes[0], rng)
            counted["while saving"] += is_saving(folder)
            victims = ([[rank] for rank in range(ranks)] + [list(range(ranks))])[number % (ranks + 1)]
            for rank in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(processes[rank], signal.SIGKILL)
            os.kill(processes[0], signal.SIGCONT)
            codes = ended(processes)
            assert all(codes), codes
            assert all(codes[rank] == -signal.SIGKILL for rank in victims), codes
            counted[f"{len(victims)} of {ranks}"] += 1
        else:
            codes = ended(processes)
            assert not any(codes), codes
    return dict(counted)


if __name__ == "__main__":
    ranks, kills, seed, _, *words = sys.argv[1:]
    print(json.dumps(run([int(number) for number in ranks.split(",")], int(kills), int(seed), words)))
