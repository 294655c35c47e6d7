"""One contestant in a process of its own: reads a command a line, answers with JSON.

host.py NAME DEVICE PATCHES PEERS

gate EDGE VIEW               → why it cannot be compared, or null
turn EDGE VIEW WORK S        → patches a second, of at least S seconds: of a core's own time on a CPU
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(sys.argv[4])  # behind the project's own packages

import gate
import numpy as np
import torch
from contestants import CONTESTANTS, DEGRADATIONS, Contestant

WORKS = {"crops": (), "views": DEGRADATIONS}
"""Two crops of each patch, and two whole views of it."""


def main() -> None:
    name, device, folder, _ = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not pass for an answer
    torch.set_num_threads(1)
    kind, device = CONTESTANTS[name], torch.device(device)

    @cache
    def ready(edge: int, view: int, work: str) -> tuple[Contestant, torch.Tensor]:
        contestant = kind(edge, view, device, WORKS[work])
        patches = loaded(folder, edge).to(device)
        contestant(patches)  # the first call sets up what later ones use again
        return contestant, patches

    for line in sys.stdin:
        command, edge, view, *rest = line.split()
        edge, view = int(edge), int(view)
        if command == "gate":
            patch = loaded(folder, edge)[:1]
            answer = gate.why_not(partial(kind, edge, view, device), patch)
        else:
            answer = rate(*ready(edge, view, rest[0]), float(rest[1]))
        print(json.dumps(answer), file=answers, flush=True)


def loaded(folder: str, edge: int) -> torch.Tensor:
    """(B, 1, X, Y, Z) int16 HU."""
    return torch.from_numpy(np.load(Path(folder) / f"{edge}.npy"))


def rate(contestant: Contestant, patches: torch.Tensor, seconds: float) -> float:
    clock = time.process_time if patches.device.type == "cpu" else time.perf_counter
    done, begin = 0, clock()
    while (now := clock()) - begin < seconds:
        contestant(patches)
        if patches.is_cuda:
            torch.cuda.synchronize()
        done += len(patches)
    return done / (now - begin)


if __name__ == "__main__":
    main()
