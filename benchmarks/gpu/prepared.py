"""A kernel's launches with their arguments made beforehand, so that the kernel alone is timed.

A variant is one more entry of `KERNELS`, "forward-NAME", with candidates of its own; `prepared` and `in_force` have to
know it, and `stages.SWEPT_KERNELS` to name it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from inputs import Rows

from mixcl_dist.kernels import mixed_contrastive_loss, tuning
from mixcl_dist.kernels.tuning import Tile


class Prepared(Protocol):
    """What a sweep times."""

    def __call__(self, kernel: str, rows: Rows, tile: Tile) -> Callable[[], object]:
        """All that comes before a kernel's launches is done now; each call of the result launches it, and no more."""


#: Kernels and their variants, and the name under which the tuning table has each.
KERNELS = {"forward": "forward", "backward": "backward"}
CANDIDATES = dict.fromkeys(KERNELS, tuning.CANDIDATES)
ALONE = False  #: whether `prepared` times the kernel without the call around it


def prepared(kernel: str, rows: Rows, tile: Tile) -> Callable[[], object]:
    """The whole call, as long as the kernels offer no launches of their own."""
    rows = rows.with_grad()

    def call() -> object:
        with in_force(kernel, rows, tile):
            loss = mixed_contrastive_loss(**vars(rows), implementation="triton").loss
            return torch.autograd.grad(loss, rows.embeddings) if kernel == "backward" else loss

    return call


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
