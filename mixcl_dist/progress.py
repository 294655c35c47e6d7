"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


class ProgressReport:
    """Shows on standard error how many units are done, the rate and the time left; call it with the counts.

    On a terminal this is a bar, elsewhere a line every ten seconds and one at the end of each unit.
    """

    def __init__(self, desc: str):
        self._desc = desc
        self._unit: str | None = None
        self._bar: tqdm | None = None
        self._shown = 0.0

    def __call__(self, done: int, total: int, unit: str) -> None:
        if unit != self._unit:
            self._begin(done, total, unit)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif done == total or time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            print(self._line(done, total), file=sys.stderr, flush=True)
        if done == total and self._bar is not None:
            self._bar.close()

    def _begin(self, done: int, total: int, unit: str) -> None:
        """Time starts here: what was done before (a resumed run's steps) does not count into the rate."""
        self._unit, self._first = unit, done
        self._start = self._shown = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(desc=self._desc, total=total, initial=done, unit=unit) if on_terminal else None

    def _line(self, done: int, total: int) -> str:
        seconds = time.monotonic() - self._start
        made = done - self._first
        head = f"{self._desc}: {done}/{total} {self._unit} ({100 * done / max(total, 1):.0f} %)"
        if made == 0 or done == total:
            return f"{head} in {tqdm.format_interval(seconds)}"
        rate = made / seconds
        speed = f"{rate:.1f} {self._unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{self._unit}"
        return f"{head}, {speed}, {tqdm.format_interval((total - done) / rate)} left"


def progress(items: Iterable[T], *, total: int, desc: str, unit: str, initial: int = 0) -> Iterator[T]:
    """Yield `items`, of which `initial` of `total` were done before, and report each as done."""
    report = ProgressReport(desc)
    report(initial, total, unit)
    for done, item in enumerate(items, initial + 1):
        yield item
        report(done, total, unit)
