"""Batches that worker processes decode straight into memory shared with the trainer; only numbers travel between them.

A data loader that sends arrays between processes copies each of them several times, which costs more than decoding.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import multiprocessing
import os
import selectors
import signal
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import DupFd
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np

from mixcl_dist.data_shards.errors import DataError
from mixcl_dist.data_shards.streaming.reader import RowRead, SampleReader, Wanted

HELD = 2
"""Batches that the trainer may hold on to before it is given copies."""
ROWS_AHEAD = 4
"""Rows for each worker that are under way while the trainer works."""


class StreamError(DataError):
    """A stream that cannot be set up or go on as asked; the message is one line with the cure."""


class Layout(NamedTuple):
    """How batches lie in the shared memory."""

    entries: int
    rows: int
    shape: tuple[int, int, int]
    labels: bool

    @property
    def _voxels(self) -> int:
        return self.rows * math.prod(self.shape)

    @property
    def _entry_bytes(self) -> int:
        used = self._voxels * (3 if self.labels else 2)
        return used + -used % mmap.PAGESIZE

    @property
    def bytes(self) -> int:
        return self.entries * self._entry_bytes

    def arrays(self, memory: mmap.mmap, entry: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The (rows, X, Y, Z) int16 image and uint8 label of one entry."""
        shape, begin = (self.rows, *self.shape), entry * self._entry_bytes
        image = np.ndarray(shape, np.int16, buffer=memory, offset=begin)
        label = np.ndarray(shape, np.uint8, buffer=memory, offset=begin + 2 * self._voxels) if self.labels else None
        return image, label


class Filled(NamedTuple):
    """A batch whose rows are all there. Its memory is used again once nobody holds on to the arrays."""

    image: np.ndarray
    label: np.ndarray | None
    outcomes: list[RowRead]
    """One for each row, in order."""


class Ring:
    """Batches in flight: `submit` them in order, `take` them in the same order.

    `replace` is called with the outcome of a row that could not be filled and says what to fill it with instead; what
    it raises comes out of `take`. `workers` 0 decodes in this process.
    """

    def __init__(
        self,
        reader: SampleReader,
        shape: tuple[int, int, int],
        rows: int,
        labels: bool,
        workers: int,
        replace: Callable[[RowRead], Wanted],
    ) -> None:
        self.ahead = max(2, math.ceil(ROWS_AHEAD * workers / rows)) if workers else 1
        """Batches that should be under way."""
        self._layout = Layout(self.ahead + HELD, rows, shape, labels)
        self._file, self.memory = _allocate(self._layout.bytes)
        self._reader = reader
        self._replace = replace
        self._free = deque(range(self._layout.entries))
        self._pending: deque[_Pending] = deque()
        self._workers = [_Worker.start(n, self._file, self._layout, reader) for n in range(workers)]
        # A ring may still be open where a program ends. Python then waits for its processes, for ever: they heed no
        # SIGTERM, by which it asks them to end.
        self._end_workers = Finalize(self, _end, (self._workers,), exitpriority=0)
        self._events = selectors.DefaultSelector()  # kept, as `connection.wait` would set up one for every message
        for worker in self._workers:
            self._events.register(worker.connection, selectors.EVENT_READ, worker)
            self._events.register(worker.process.sentinel, selectors.EVENT_READ, worker)

    def __len__(self) -> int:
        """Batches under way."""
        return len(self._pending)

    def submit(self, wanted: Sequence[Wanted]) -> None:
        """Begin the next batch; there must be fewer than `ahead` under way."""
        batch = _Pending(self._free.pop(), [None] * len(wanted))
        self._pending.append(batch)
        if self._workers:
            size = math.ceil(len(wanted) / len(self._workers))
            for first in range(0, len(wanted), size):
                self._send(batch.entry, wanted[first : first + size])
        else:
            batch.waiting = deque(wanted)

    def take(self) -> Filled:
        """The oldest batch, once it is whole. Raises `StreamError` when a worker has died."""
        batch = self._pending[0]
        while not batch.whole:
            if self._workers:
                self._receive()
            else:
                self._note(batch, self._reader.read([batch.waiting.popleft()], *self._arrays(batch.entry)))
        self._pending.popleft()
        image, label = self._arrays(batch.entry)
        if not self._free:  # the trainer still holds the last ones; it must not see them change
            image, label = image.copy(), None if label is None else label.copy()
            self._free.append(batch.entry)
        else:
            arrays = [array for array in (image, label) if array is not None]
            lease = _Lease(self._free, batch.entry, len(arrays))
            for array in arrays:
                weakref.finalize(array, lease.release)
        return Filled(image, label, [outcome for outcome in batch.outcomes if outcome])

    def close(self) -> None:
        """End the workers; arrays that were taken stay valid."""
        self._events.close()
        self._end_workers()
        self._file.close()

    def _arrays(self, entry: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self._layout.arrays(self.memory, entry)

    def _send(self, entry: int, wanted: Sequence[Wanted]) -> None:
        worker = min(self._workers, key=lambda one: one.rows)
        worker.rows += len(wanted)
        try:
            worker.connection.send((entry, wanted))
        except OSError:
            raise StreamError(worker.death()) from None

    def _receive(self) -> None:
        """Wait for a worker and note what it has filled."""
        for key, _ in self._events.select():
            worker: _Worker = key.data
            try:
                if key.fileobj is not worker.connection and not worker.connection.poll():
                    raise EOFError  # the process has ended and left nothing to be read
                entry, outcomes = worker.connection.recv()
            except (EOFError, OSError):
                raise StreamError(worker.death()) from None
            worker.rows -= len(outcomes)
            self._note(next(batch for batch in self._pending if batch.entry == entry), outcomes)

    def _note(self, batch: _Pending, outcomes: Sequence[RowRead]) -> None:
        again = [self._replace(outcome) for outcome in outcomes if outcome.cause is not None]
        for outcome in outcomes:
            if outcome.cause is None:
                batch.outcomes[outcome.wanted.row] = outcome
        if again and self._workers:
            self._send(batch.entry, again)
        else:
            batch.waiting.extend(again)


@dataclass
class _Pending:
    """A batch under way."""

    entry: int
    outcomes: list[RowRead | None]
    waiting: deque[Wanted] = field(default_factory=deque)
    """Rows that this process has still to fill, where there are no workers."""

    @property
    def whole(self) -> bool:
        return None not in self.outcomes


@dataclass
class _Lease:
    """Gives an entry back when all arrays in it are gone."""

    free: deque[int]
    entry: int
    shares: int
    """Arrays that are still held."""

    def release(self) -> None:
        self.shares -= 1
        if self.shares == 0:
            self.free.append(self.entry)


@dataclass
class _Worker:
    process: SpawnProcess
    connection: connection.Connection
    rows: int = 0
    """Rows it has still to fill."""

    @classmethod
    def start(cls, number: int, file: Any, layout: Layout, reader: SampleReader) -> _Worker:
        context = multiprocessing.get_context("spawn")  # a fork would copy the trainer's threads and GPU context
        mine, its = context.Pipe()
        target = _Start(file, layout, reader)
        process = context.Process(target=target, args=(its,), name=f"stream-{number}", daemon=True)
        process.start()
        its.close()
        return cls(process, mine)

    def death(self) -> str:
        self.process.join(5)
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        cause = "is there enough memory?" if code == -signal.SIGKILL else "its own message is above;"
        who = f"stream worker {self.process.name} (process {self.process.pid})"
        return f"{who} {how}; {cause} run again with --resume latest"

    def stop(self) -> None:
        self.connection.close()  # it ends at the end of its pipe
        self.process.join(1)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.stop()


class _Start:
    """What a worker process runs; the memory's file is handed down while the process starts."""

    def __init__(self, file: Any, layout: Layout, reader: SampleReader) -> None:
        self._file, self._layout, self._reader = file, layout, reader

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": DupFd(self._file.fileno())}

    def __call__(self, parent: connection.Connection) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # schedulers send them to all processes
            signal.signal(number, signal.SIG_IGN)  # the trainer decides when to stop
        _keep_freed_memory()
        memory = mmap.mmap(self._file.detach(), self._layout.bytes)
        arrays = [self._layout.arrays(memory, entry) for entry in range(self._layout.entries)]
        while True:
            try:
                entry, wanted = parent.recv()
                parent.send((entry, self._reader.read(wanted, *arrays[entry])))
            except (EOFError, ConnectionError):
                return  # the trainer has ended


def _keep_freed_memory() -> None:
    """Else glibc gives the memory of every payload back, and the next one faults all its pages in again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            mallopt(parameter, 1 << 30)


def _allocate(size: int) -> tuple[Any, mmap.mmap]:
    """Shared memory of `size` bytes, all of it really there: else a worker would die at the first page that is not.

    Not in /dev/shm, which containers keep small.
    """
    try:
        if hasattr(os, "memfd_create"):
            file: Any = os.fdopen(os.memfd_create("mixcl-ring"), "r+b")
        else:
            file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the ring
        os.ftruncate(file.fileno(), size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        return file, mmap.mmap(file.fileno(), size)
    except OSError as error:
        cure = "lower the batch size or data.workers"
        raise StreamError(f"no {size / 2**20:.0f} MiB of memory for batches ({error.strerror}); {cure}") from None
