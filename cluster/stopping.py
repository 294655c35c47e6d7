"""A request to stop, which schedulers make by a signal before they take a machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What SLURM and Kubernetes send, and what SLURM is usually told to send (`--signal=USR1@60`)."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the block these signals end nothing, but are noted: gives a function that tells whether one has come.

    Outside of the main thread, which alone may handle signals, none ever comes.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = {number: signal.signal(number, lambda *_: came.set()) for number in SIGNALS}
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
