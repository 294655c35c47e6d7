"""One contestant in a process of its own, under its own interpreter: reads a command a line, answers with JSON.

host.py MODULE NAME DATA BATCH_SIZE WORKERS

epoch     → digests of all samples of one epoch, in the order they came
begin     → starts the endless stream and takes batches until it runs steadily
turn S    → patches, batches and seconds of a run of at least S seconds
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch
import xxhash

WARM_UP_BATCHES = 6
"""For each worker, at least; more than any contestant prefetches."""
WARM_UP_SECONDS = 0.5
LEAST_BATCHES = 4
"""Of each worker in a turn: workers deliver in turn, so that fewer would measure whose turn it was."""


def main() -> None:
    module, name, data, batch_size, workers = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not pass for an answer
    torch.set_num_threads(1)
    contestant = import_module(module).CONTESTANTS[name](Path(data), int(batch_size), int(workers))
    stream: Iterator[torch.Tensor | int] = iter(())
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "epoch":
            answer: object = [digest for batch in contestant.epoch() for digest in digests(batch)]
        elif command == "begin":
            stream = contestant.endless()
            answer = run(stream, WARM_UP_SECONDS, WARM_UP_BATCHES * int(workers))
        else:
            next(stream)  # a batch that was on its way when this process was stopped
            answer = run(stream, float(arguments[0]), LEAST_BATCHES * int(workers))
        print(json.dumps(answer), file=answers, flush=True)
    del stream  # a loader ends its workers; one that is killed while it makes shared memory leaves it behind
    gc.collect()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)  # threads of some libraries would hold up an ordinary exit


def run(stream: Iterator[torch.Tensor | int], seconds: float, least: int) -> dict[str, float]:
    """Take at least `least` batches for at least `seconds`, timed from the arrival of one to that of another."""
    batches = patches = 0
    begin = now = time.perf_counter()
    while now - begin < seconds or batches < least:
        patches += touch(next(stream))
        batches += 1
        now = time.perf_counter()
    return {"batches": batches, "patches": patches, "seconds": now - begin}


def touch(batch: torch.Tensor | int) -> int:
    """The number of patches, each of which must have arrived for this: 64 of its voxels are added up."""
    if isinstance(batch, int):
        return batch
    batch[..., ::24, ::24, ::24].sum().item()
    return len(batch)


def digests(batch: torch.Tensor) -> list[str]:
    """Of the voxels of each patch of a batch (B, 1, X, Y, Z) or (B, X, Y, Z) int16."""
    if batch.dtype != torch.int16:
        raise TypeError(f"a batch has {batch.dtype} where int16 is asked for")
    return [xxhash.xxh3_128_hexdigest(patch.contiguous().numpy().tobytes()) for patch in batch]


if __name__ == "__main__":
    main()
