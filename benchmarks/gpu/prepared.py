"""A kernel's launches with their arguments made beforehand, so that the kernel alone is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import gate
from inputs import Rows

from mixcl_dist.kernels import backward, forward, triangle, tuning
from mixcl_dist.kernels.tuning import Tile


class Sweep(NamedTuple):
    """A kernel or a variant of one."""

    table: str  #: under which name the tuning table has its tiles
    candidates: list[Tile]
    functions: tuple[tuple[ModuleType, str], ...]  #: which are no more than its launches


SWEEPS = {
    "forward": Sweep("forward", tuning.CANDIDATES, ((forward, "sweep"),)),
    "backward": Sweep("backward", tuning.CANDIDATES, ((backward, "sweep"),)),
    # Whole pairs of blocks by a kernel of their own, and the rest by today's.
    "forward-triangle": Sweep(
        "triangle", tuning.TRIANGLE_CANDIDATES, ((forward, "sweep"), (triangle, "add_pair_sums"))
    ),
}


def prepared(kernel: str, rows: Rows, tile: Tile) -> Callable[[], object]:
    """All that comes before a kernel's launches is done now; each call of the result launches it, and no more.

    What one call of the public function hands to the kernel is kept, and handed to it again.
    """
    kept: list[Callable[[], object]] = []

    def keeping(function: Callable) -> Callable:
        def keep(*arguments: object) -> object:
            kept.append(functools.partial(function, *arguments))
            return function(*arguments)

        return keep

    with ExitStack() as stack:
        for module, name in SWEEPS[kernel].functions:
            stack.enter_context(mock.patch.object(module, name, keeping(getattr(module, name))))
        stack.enter_context(in_force(kernel, rows, tile))
        gate.evaluate(rows, "triton")
    return lambda: [launch() for launch in kept]


@contextmanager
def in_force(kernel: str, rows: Rows, tile: Tile) -> Iterator[None]:
    """Block in which the public function runs `kernel` with `tile` for rows like these."""
    tiles = {SWEEPS[kernel].table: tile}
    if kernel == "forward-triangle":
        tiles["forward"] = tuning.launch_for(rows.embeddings, "forward").tile._replace(triangle=True)
    architecture, size = tuning.architecture_of(rows.embeddings.device), rows.embeddings.element_size()
    changed = {}
    for name, chosen in tiles.items():
        key = architecture, name, size
        changed[key] = dict(sorted((tuning.TILES[key] | {rows.embeddings.shape[1]: chosen}).items()))
    with mock.patch.dict(tuning.TILES, changed):
        yield
