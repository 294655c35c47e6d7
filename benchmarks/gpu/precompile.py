"""Compile the Triton kernels for Hopper without a GPU, into TRITON_CACHE_DIR, as the gate and the benchmark call them.

    TRITON_CACHE_DIR=CACHE python benchmarks/gpu/precompile.py

The public function runs on the CPU with every launch replaced by compiling; what it computes means nothing. By another
Triton than the machine's, or of other sources, such a cache is passed over there.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import worker  # noqa: F401, first, as it makes what follows importable

# isort: split
import gate
import torch
from inputs import make_rows, with_every_argument
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

from mixcl_dist.kernels import implementation, op, tuning

WIDTHS, COMMON = (1024, 256, 192, 128, 64), 128
HALF_WIDTHS = (256, 192)  #: measured in 16 bits alone
COUNTS = (513, 512)  #: rows; sizes that 16 divides are compiled apart


class Hopper:
    """A driver that does no more than name its target."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    begin = time.monotonic()
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), initializer=pretend) as pool:
        failures = [failure for failure in pool.map(compile_for, *zip(*wanted(), strict=True)) if failure]
    print("\n".join(failures), file=sys.stderr)  # the machine compiles what is missing
    made = len(list(Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")))
    print(f"{made} kernels compiled for sm_90 in {time.monotonic() - begin:.0f} s, {len(failures)} calls failed")
    if not made:
        sys.exit("nothing was compiled")


def pretend() -> None:
    """Let a CPU's tensors pass for Hopper's, and launches compile only."""
    driver.set_active(Hopper())
    KernelInterface.__getitem__ = lambda self, grid: lambda *a, **k: self.run(*a, grid=grid, warmup=True, **k)
    tuning.architecture_of = lambda device: "sm_90"
    implementation.obstacle = lambda *_: None
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    op.check_values = lambda *_: None


def wanted() -> list[tuple[torch.dtype, int, int]]:
    """Dtypes, widths and numbers of rows for which other variants of the kernels are called, the longest first."""
    calls = itertools.product((torch.float32, *gate.HALF), WIDTHS, COUNTS)
    return [
        (dtype, width, count)
        for dtype, width, count in calls
        if (width == COMMON or count == COUNTS[0]) and (dtype in gate.HALF or width not in HALF_WIDTHS)
    ]


def compile_for(dtype: torch.dtype, width: int, count: int) -> str:
    """Forward and backward with and without groups, at the common width with either relation alone; what went wrong."""
    rows = make_rows("realistic", count, width, dtype, torch.device("cpu"))
    variants = [rows, with_every_argument(rows)]
    if width == COMMON:
        variants += [replace(rows, label_weight=0.0), replace(rows, identity_weight=0.0)]
    try:
        for variant in variants:
            gate.evaluate(variant, "triton")
    except Exception as error:
        return f"{dtype}, {count} x {width}: {type(error).__name__}: {str(error)[:200]}"
    return ""


if __name__ == "__main__":
    main()
