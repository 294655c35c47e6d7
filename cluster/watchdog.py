"""Whether the other ranks live and go on: names the one that is lost or hangs, leaves all stacks, and ends all ranks.

Every rank beats through the store at which they met. Rank 0 reads the beats of all, the others those of rank 0, so that
the store has little to do at any number of ranks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

BEAT_S = 1.0
LOOK_S = 0.1
"""The same once this rank is about to end."""
LOST_S = 18.0
"""Silence after which a rank is lost: its process may hold the interpreter for some seconds, a network may stumble."""
ASKED_S = 3.0
"""The same once something else has failed; and how long the main thread may take to end by itself."""
LEAVING_S = 5.0
"""Longest time that rank 0, at which all meet, waits for the others to leave."""
HEARD_S = 3.0
"""In which all ranks hear what rank 0 has found."""
EXIT_CODE = 2
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
LIBRARIES = ("/torch/", "/deepspeed/")
CURE = "start all ranks again, with --resume latest where there is a checkpoint"


@dataclass(frozen=True)
class Beat:
    """What a rank tells every second."""

    host: str
    number: int
    doing: str
    seconds: float
    """For which it has been doing that."""
    at: str
    """Where in the code."""
    waits: bool
    """Whether it waits for other ranks there."""
    left: str | None
    """Why it ends; "" where there is nothing to tell."""


class Watchdog:
    """Two threads of this rank: one exchanges beats, which a broken network may block, the other judges them.

    `store` is where all ranks met, `hung_s` the longest time that all of them together may be at one thing, `stacks` a
    folder in which each leaves its threads' stacks where one hangs.
    """

    def __init__(
        self, store: Any, rank: int, world_size: int, *, host: str, hung_s: float, stacks: Path | None
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._host, self._hung_s, self._stacks = host, hung_s, stacks
        self._main = threading.get_ident()
        self._lived = 0.0
        """Seconds, without those in which this process was suspended."""
        self._doing, self._since = "the start", 0.0
        self._left: str | None = None
        self._leaving = threading.Event()
        self._heard: dict[int, Beat] = {}
        self._changed: dict[int, float] = {}
        """Rank → `_lived` when its beat was last a new one."""
        self._verdict: str | None = None
        self._exchanges, self._unreachable = 0, False
        self._beats = threading.Thread(target=self._beat, name="beats", daemon=True)
        self._beats.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def doing(self, what: str) -> None:
        """Tell that this rank goes on, and with what."""
        self._doing, self._since = what, self._lived

    def blame(self, problem: str) -> str:
        """Who is to blame for `problem`, by which a word with the others failed, in one line; takes some seconds."""
        self._leaving.set()
        exchanges, line = self._exchanges, None
        for _ in range(round(2 * ASKED_S / LOOK_S)):  # not until some `_lived`, which stands still where beats do
            time.sleep(LOOK_S)
            line = self._ended(ASKED_S)
            if line or self._unreachable:
                break
        else:
            line = self._apart() if self._exchanges == exchanges else None
        return f"{line or problem}; {CURE}"

    def claim(self) -> bool:
        """Whether it is for this rank to tell why all of them end: for the first one that asks."""
        if self._unreachable:
            return True
        try:
            return self._store.add("told", 1) == 1
        except RuntimeError:
            return True

    def leave(self, reason: str) -> None:
        """Tell the others that this rank ends and, where it is by itself, why; rank 0 waits for them to leave, too."""
        self._left = reason
        self._leaving.set()
        self._beats.join(LEAVING_S)
        faulthandler.cancel_dump_traceback_later()

    def _beat(self) -> None:
        before = time.monotonic()
        try:
            while True:
                told = self._left is not None
                self._exchange()
                if told and not (self._rank == 0 and self._others_stay()):
                    return
                # Where C code holds the interpreter, no thread can beat, and the others take this rank for lost.
                faulthandler.dump_traceback_later(LOST_S)
                time.sleep(LOOK_S) if self._leaving.is_set() else self._leaving.wait(BEAT_S)
                now = time.monotonic()
                self._lived += min(now - before, 2 * BEAT_S)
                before = now
        except RuntimeError:
            self._unreachable = True

    def _exchange(self) -> None:
        at, waits = _place(sys._current_frames().get(self._main))
        seconds = round(self._lived - self._since, 1)
        beat = Beat(self._host, self._exchanges, self._doing, seconds, at, waits, self._left)
        self._store.set(_key(self._rank), json.dumps(asdict(beat)))
        if self._rank and self._store.check(["verdict"]):
            self._verdict = self._store.get("verdict").decode()
        ranks = range(self._world_size) if self._rank == 0 or self._leaving.is_set() else [0]
        there = [rank for rank in ranks if rank in self._changed or self._store.check([_key(rank)])]
        contents = self._store.multi_get([_key(rank) for rank in there])
        heard = {rank: Beat(**json.loads(content)) for rank, content in zip(there, contents, strict=True)}
        for rank, beat in heard.items():
            if rank not in self._heard or beat.number != self._heard[rank].number:
                self._changed[rank] = self._lived
        self._heard = heard
        self._exchanges += 1

    def _others(self) -> Iterator[tuple[int, Beat, float]]:
        """Every other rank that was heard of, its newest beat, and the seconds since."""
        heard = self._heard
        return ((rank, beat, self._lived - self._changed[rank]) for rank, beat in heard.items() if rank != self._rank)

    def _others_stay(self) -> bool:
        return any(beat.left is None and silent < ASKED_S for _, beat, silent in self._others())

    def _watch(self) -> None:
        exchanges, stuck, sure = -1, 0.0, 0.0
        while not self._leaving.wait(BEAT_S):
            stuck = stuck + BEAT_S if exchanges == self._exchanges else 0.0
            exchanges = self._exchanges
            if found := self._verdict or self._hung():
                self._end(found)
            line = self._ended(LOST_S)
            if self._unreachable or stuck >= LOST_S:
                line = self._apart()
            sure = sure + BEAT_S if line else 0.0
            if line and sure >= ASKED_S:  # else the main thread has heard of it, too, and ends in order
                self._end(line)

    def _apart(self) -> str:
        """Where rank 0 is silent but its machine has not closed the connection, each word with the store would wait."""
        self._unreachable = True
        return f"rank 0, at which all ranks meet, cannot be reached from {self._host}"

    def _ended(self, silence_s: float) -> str | None:
        """The first rank that has left by itself, or is silent."""
        for rank, beat, silent in self._others():
            who = f"rank {rank} on {beat.host}"
            if beat.left:
                return f"{who} has ended: {beat.left}"
            if beat.left is None and silent >= silence_s:
                return f"{who} has ended or cannot be reached, in {beat.doing}; see what it or its machine says"
        return None

    def _hung(self) -> str | None:
        """For rank 0: the first rank that does not go on, once none of them does."""
        heard = self._heard
        if self._rank or len(heard) < self._world_size or min(beat.seconds for beat in heard.values()) < self._hung_s:
            return None
        working = [rank for rank, beat in heard.items() if not beat.waits]
        left = f"; the stacks of all ranks are in {self._stacks}" if self._stacks else ""
        if not working or len(working) == len(heard):
            return f"no rank has gone on for {self._hung_s:g} s (engine.timeout_s), in {heard[0].doing}{left}"
        rank, beat = working[0], heard[working[0]]
        where = f"in {beat.doing}, at {beat.at}"
        return f"rank {rank} on {beat.host} has hung for {beat.seconds:.0f} s (engine.timeout_s) {where}{left}"

    def _end(self, line: str) -> None:
        """End this process, whose main thread waits for others and cannot be told."""
        if self._rank == 0:
            self._store.set("verdict", line)
        if self._stacks:
            with suppress(OSError):
                self._stacks.mkdir(parents=True, exist_ok=True)
                with (self._stacks / f"rank_{self._rank:05d}.txt").open("w") as file:
                    faulthandler.dump_traceback(file)
        if self.claim():
            print(f"mixcl: {line}; {CURE}", file=sys.stderr, flush=True)
        if self._rank == 0:
            time.sleep(HEARD_S)
        os._exit(EXIT_CODE)


def _key(rank: int) -> str:
    return f"beat {rank}"


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is, outside of libraries, and whether it waits for other ranks there."""
    place, waits = "its end", False
    while frame is not None:
        file = frame.f_code.co_filename
        waits = waits or any(part in file for part in COLLECTIVES)
        if not any(part in file for part in LIBRARIES):
            return f"{Path(file).name}:{frame.f_lineno} in {frame.f_code.co_name}", waits
        frame = frame.f_back
    return place, waits
