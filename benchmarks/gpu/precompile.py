"""Compile the Triton kernels for Hopper without a GPU, into TRITON_CACHE_DIR, as the gate and the benchmark call them.

    TRITON_CACHE_DIR=CACHE python benchmarks/gpu/precompile.py

The public function runs on the CPU with every launch replaced by compiling; what it computes means nothing. By another
Triton than the machine's, or of other sources, such a cache is passed over there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from worker import ROOT  # first, as it makes what follows importable

# isort: split
import gate
import torch
from inputs import Rows, make_rows, with_every_argument
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

from mixcl_dist.kernels import implementation, op, tuning

WIDTHS = (64, 128, 192, 256, 1024)
COUNTS = (513, 512)  #: rows; pointers and sizes that 16 divides are compiled apart


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
    pretend()
    failed = 0
    for rows in wanted():
        try:
            call(rows)
        except Exception as error:  # the machine compiles what is missing
            failed += 1
            print(f"{tuple(rows.embeddings.shape)}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    made = len(list(Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")))
    print(f"{made} kernels compiled for sm_90 in {time.monotonic() - begin:.0f} s, {failed} calls failed")
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


def wanted() -> list[Rows]:
    """Rows for which other variants of the kernels are called, by dtype, width, groups and weights."""
    found = []
    for dtype, width, count in itertools.product((*gate.HALF, torch.float32), WIDTHS, COUNTS):
        rows = make_rows("realistic", count, width, dtype, torch.device("cpu"))
        found += [rows, with_every_argument(rows)]
        if width == 128:
            found += [replace(rows, label_weight=0.0), replace(rows, identity_weight=0.0)]
    return found


def call(rows: Rows) -> None:
    """Forward and backward; the two operators, as what lies around them would look at the numbers."""
    gate.evaluate(rows, "triton")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
