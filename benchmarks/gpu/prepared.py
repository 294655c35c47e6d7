"""A kernel's launches with their arguments made beforehand, so that the kernel alone is timed.

A variant is one more entry of `KERNELS`, "forward-NAME", with candidates of its own; `prepared` and `in_force` have to
know it, and `stages.SWEPT_KERNELS` to name it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gate
from inputs import Rows

from mixcl_dist.kernels import backward, forward, tuning
from mixcl_dist.kernels.tuning import Tile

#: Kernels and their variants, and the name under which the tuning table has each.
KERNELS = {"forward": "forward", "backward": "backward"}
CANDIDATES = dict.fromkeys(KERNELS, tuning.CANDIDATES)
SWEEPS = {"forward": forward, "backward": backward}  #: modules whose `sweep` is no more than a kernel's launches


def prepared(kernel: str, rows: Rows, tile: Tile) -> Callable[[], object]:
    """All that comes before a kernel's launches is done now; each call of the result launches it, and no more.

    What one call of the public function hands to the kernel is kept, and handed to it again.
    """
    module, kept = SWEEPS[kernel], []
    sweep = module.sweep

    def keep(*arguments: object) -> object:
        kept.append(arguments)
        return sweep(*arguments)

    module.sweep = keep
    try:
        with in_force(kernel, rows, tile):
            gate.evaluate(rows, "triton")
    finally:
        module.sweep = sweep
    return lambda: [sweep(*arguments) for arguments in kept]


@contextmanager
def in_force(kernel: str, rows: Rows, tile: Tile) -> Iterator[None]:
    """Block in which the public function runs `kernel` with `tile` for rows like these."""
    key = tuning.architecture_of(rows.embeddings.device), KERNELS[kernel], rows.embeddings.element_size()
    before = tuning.TILES[key]
    tuning.TILES[key] = dict(sorted((before | {rows.embeddings.shape[1]: tile}).items()))
    try:
        yield
    finally:
        tuning.TILES[key] = before
