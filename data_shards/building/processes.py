"""Work on many items in processes of this machine; one that dies is told of and takes no other item with it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Mapper(Protocol):
    """Runs work elsewhere: in processes of this machine (`in_processes`) or of a cluster."""

    def __call__(
        self, work: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result | None, str | None]]:
        """Yield, as each ends, (item, `work(item)`, None), or (item, None, how it died) for an item whose process died
        twice. What `work` raises comes out. `work` and the items can be pickled.
        """


def in_this_process(
    work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result | None, str | None]]:
    """The `Mapper` that runs nothing elsewhere."""
    return ((item, work(item), None) for item in items)


def in_processes(workers: int) -> Mapper:
    """A `Mapper` onto `workers` processes of this machine.

    A process that dies takes its pool with it; the items then in hand are tried again one by one.
    """
    return partial(_run, workers)


def _run(
    workers: int, work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result | None, str | None]]:
    waiting = deque(items)
    while waiting:
        suspects = yield from _run_until_crash(workers, work, waiting)
        for suspect in suspects:
            if (yield from _run_until_crash(1, work, deque([suspect]))):
                yield suspect, None, "out of memory, or a fault in a decoder"


def _run_until_crash(
    workers: int, work: Callable[[Item], Result], waiting: deque[Item]
) -> Generator[tuple[Item, Result, None], None, list[Item]]:
    """Empty `waiting` through a pool; returns the items in hand when one of its processes died, else []."""
    in_hand: dict[Future[Result], Item] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            while waiting or in_hand:
                while waiting and len(in_hand) < workers:
                    in_hand[pool.submit(work, waiting[0])] = waiting[0]
                    waiting.popleft()
                for future in wait(in_hand, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield in_hand.pop(future), result, None
        except BrokenProcessPool:
            return list(in_hand.values())
    return []


def _end_with_parent() -> None:
    """Without this a worker whose build was killed would wait for more work for ever."""

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
