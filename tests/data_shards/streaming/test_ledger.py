"""The ledger: runs that are killed and go on with other ranks and workers show what an uninterrupted run shows."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import webdataset as wds

from mixcl_dist.data_shards.streaming.stream import PatchStream

pytestmark = pytest.mark.slow

BATCH, SEED = 12, 5
TRAINER = """
import json, os, sys, time
from pathlib import Path
from mixcl_dist.data_shards.streaming.stream import PatchStream

def main(shards, run, rank, world_size, accumulation_steps, workers, batch):
    stream = PatchStream(shards, batch_size=batch, seed=5, workers=workers, label_cases={"a"}, rank=rank,
                         world_size=world_size, accumulation_steps=accumulation_steps)
    state = Path(run, "position.json")
    if state.exists():
        stream.seek(json.loads(state.read_text()))
    ledger = open(Path(run, f"ledger-{os.getpid()}.jsonl"), "a", buffering=1)
    step = stream.position()["slot"] // batch
    batches = iter(stream)
    while True:
        for _ in range(accumulation_steps):
            one = next(batches)
            for slot, key in zip(one.slots, one.keys):
                ledger.write(json.dumps([slot, key, int(one.image[slot % len(one.keys)].sum())]) + chr(10))
            del one
        step += 1
        # The others are waited for, as in training; rank 0 then leaves a checkpoint of every third step.
        Path(run, f"done-{world_size}-{step}-{rank}").touch()
        while not all(Path(run, f"done-{world_size}-{step}-{other}").exists() for other in range(world_size)):
            time.sleep(0.002)
        if rank == 0 and step % 3 == 0:
            draft = state.with_suffix(".tmp")
            draft.write_text(json.dumps(stream.position()))
            draft.replace(state)

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
"""


def run_and_kill(script: Path, shards: Path, run: Path, legs: random.Random, world_size: int, rest: tuple[int, int]):
    """One leg: as many trainers as ranks, killed at a random moment after a checkpoint of their own."""
    before = (run / "position.json").read_text() if (run / "position.json").exists() else None
    ranks = [
        subprocess.Popen([sys.executable, script, shards, run, *map(str, (rank, world_size, *rest, BATCH))])
        for rank in range(world_size)
    ]
    try:
        end = time.monotonic() + 400
        while not (run / "position.json").exists() or (run / "position.json").read_text() == before:
            assert all(rank.poll() is None for rank in ranks) and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(legs.uniform(0, 0.3))
    finally:
        for rank in legs.sample(ranks, len(ranks)):
            rank.kill()
        for rank in ranks:
            rank.wait()
        for mark in run.glob("done-*"):
            mark.unlink()


def test_killed_and_resumed_runs_show_exactly_what_one_run_shows(built, tmp_path):
    script, run = tmp_path / "trainer.py", tmp_path / "run"
    script.write_text(TRAINER)
    run.mkdir()
    legs = random.Random(0)
    position, entries = 0, {}
    for world_size, accumulation_steps, workers in ((1, 1, 2), (3, 2, 0), (2, 1, 1), (4, 3, 1), (1, 4, 3)):
        run_and_kill(script, built, run, legs, world_size, (accumulation_steps, workers))
        written = [json.loads(line) for path in run.glob("ledger-*") for line in _whole_lines(path)]
        reached = json.loads((run / "position.json").read_text())["slot"]
        assert reached > position
        for slot, *shown in written:
            # What was shown after the last checkpoint is shown again: it must be the same, too.
            assert entries.setdefault(slot, shown) == shown
        assert set(range(reached)) <= entries.keys()
        position = reached

    whole = PatchStream(built, batch_size=BATCH, seed=SEED, workers=0, label_cases={"a"})
    batches = iter(whole)
    for first in range(0, position, BATCH):
        batch = next(batches)
        assert batch.slots == list(range(first, first + BATCH))
        assert [entries[slot][0] for slot in batch.slots] == batch.keys
    epoch, stored = whole.samples_per_epoch, {s["__key__"] for s in wds.WebDataset(_tars(built), shardshuffle=False)}
    assert position > epoch, "the legs were too short to pass an epoch"
    for first in range(0, position - epoch + 1, epoch):
        assert Counter(entries[slot][0] for slot in range(first, first + epoch)) == Counter(stored)


def _whole_lines(path: Path) -> list[str]:
    return path.read_text().rpartition("\n")[0].splitlines()


def _tars(shards: Path) -> list[str]:
    return [str(path) for path in shards.glob("*.tar")]
