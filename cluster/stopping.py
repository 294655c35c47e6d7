"""A request to stop, which schedulers make by a signal before they take a machine away."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What SLURM and Kubernetes send, and what SLURM is usually told to send (`--signal=USR1@60`)."""


@contextmanager
def stop_requests(most_s: float = math.inf) -> Iterator[Callable[[], bool]]:
    """Within the block these signals end nothing, but are noted: gives a function that tells whether one has come, or
    `most_s` seconds have passed.

    Outside of the main thread, which alone may handle signals, none ever comes.
    """
    came, end = threading.Event(), time.monotonic() + most_s

    def requested() -> bool:
        return came.is_set() or time.monotonic() >= end

    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    before = {number: signal.signal(number, lambda *_: came.set()) for number in SIGNALS}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
