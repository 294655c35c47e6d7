"""How long a piece of work takes and how much memory it needs.

Work is a generator function that yields after each of its laps. What is compared is timed in one loop, each contestant
once a round, so that a drift of the clocks meets all alike; ratios are taken within a round.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

Work = Callable[[], Iterator[None]]

FLUSH_BYTES = 256 * 2**20  #: more than the second-level cache of any GPU
LONG_ROUND = 20.0  #: seconds
MATMUL_SIZES = {"cuda": (4096, 8192, 16384), "cpu": (1024, 2048)}
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class Stopwatch:
    """Times laps on one device, in ms: by events and with a cold cache on a GPU, by the clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if self.on_gpu else None

    def laps(self, work: Work) -> list[float]:
        return self._gpu_laps(work) if self.on_gpu else self._cpu_laps(work)

    def _gpu_laps(self, work: Work) -> list[float]:
        self.flush.zero_()  # long enough that the first launches of the work queue up behind it
        events = [torch.cuda.Event(enable_timing=True)]
        events[0].record()
        for _ in work():
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]

    def _cpu_laps(self, work: Work) -> list[float]:
        times = [time.perf_counter()]
        times += [time.perf_counter() for _ in work()]
        return [1000 * (end - start) for start, end in itertools.pairwise(times)]

    def rounds(self, contestants: dict[str, Work], seconds: float, most: int) -> dict[str, list[list[float]]]:
        """Laps of each contestant in up to ``most`` rounds that take some ``seconds`` in all, after a warm-up.

        There are 3 rounds at least, but one where a round is long.
        """
        begin = time.perf_counter()
        for work in contestants.values():
            self.laps(work)
        warm_up = time.perf_counter() - begin
        count = 1 if warm_up > LONG_ROUND else min(max(int(seconds / warm_up), 3), most)
        results: dict[str, list[list[float]]] = {name: [] for name in contestants}
        for _ in range(count):
            for name, work in contestants.items():
                results[name].append(self.laps(work))
        return results

    def extra_memory(self, work: Work) -> int | None:
        """Bytes at the peak beyond what was allocated before, of a GPU; None on the CPU, which does not count."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        for _ in work():
            pass
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def loss_and_gradient(loss: Callable[[], Tensor], embeddings: Tensor, scale: float) -> Work:
    """The forward and the backward of a loss, as two laps.

    Its gradient is asked for ``scale`` times, as a loss scaler would: float16 holds nothing below 6e-8, and a product
    of numbers that have become zero is not as fast as one of others.
    """

    def work() -> Iterator[None]:
        value = loss()
        yield
        torch.autograd.grad(value, embeddings, torch.full_like(value, scale))
        yield

    return work


class Matmul:
    """The best that a large product of square matrices reaches here, as a contestant for every round."""

    def __init__(self, stopwatch: Stopwatch, dtype: torch.dtype, seconds: float = 0.5) -> None:
        generator = torch.Generator(stopwatch.device).manual_seed(0)

        def square(size: int) -> Tensor:
            return torch.randn(size, size, generator=generator, device=stopwatch.device).to(dtype)

        products = {size: _product(square(size), square(size)) for size in MATMUL_SIZES[stopwatch.device.type]}
        rates = {}
        for size, work in products.items():
            laps = stopwatch.rounds({"matmul": work}, seconds, 20)["matmul"]
            rates[size] = self._teraflops(size, statistics.median(itertools.chain(*laps)))
        self.size = max(rates, key=rates.get)
        self.teraflops = rates[self.size]  #: when measured alone
        self.work = products[self.size]

    def rates(self, laps: list[list[float]]) -> list[float]:
        """TFLOP/s of each round."""
        return [self._teraflops(self.size, ms) for (ms,) in laps]

    @staticmethod
    def _teraflops(size: int, ms: float) -> float:
        return 2 * size**3 / ms / 1e9


def _product(left: Tensor, right: Tensor) -> Work:
    out = torch.empty_like(left)

    def work() -> Iterator[None]:
        torch.matmul(left, right, out=out)
        yield

    return work


def spread(values: Iterable[float]) -> list[float]:
    """Median, least and greatest."""
    values = list(values)
    return [statistics.median(values), min(values), max(values)]


def in_new_process(function: Callable, *arguments: object) -> dict:
    """What a function returns in a process of its own, with ``peak_bytes``, the most memory that process held."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(function, *arguments).result()
        return result | {"peak_bytes": pool.submit(peak_bytes).result()}


def peak_bytes() -> int | None:
    """The most memory this process has held, None where the system does not say.

    ``getrusage`` would count the parent's memory, too, which a new process shares until it starts its program.
    """
    if not sys.platform.startswith("linux"):
        return None
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo") as info:
            model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} of {os.cpu_count()} cores"
