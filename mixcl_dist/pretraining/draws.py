"""Random numbers of a batch, patch by patch: each patch has its own source, named by the run's seed and its slot."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mixcl_dist.kernels.random import random


class Draws:
    """Sources of random numbers for B patches.

    What a patch is given depends on (seed, slot) and the number of draws before alone, not on the patches beside it
    nor on the device: so a run repeats its views on any number of ranks, and after any stop.
    """

    def __init__(self, seed: int, slots: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        # Pinned, so that the copy does not wait.
        slot = torch.empty(len(slots), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        slot.numpy()[:] = slots
        self._slot = slot.to(self.device, non_blocking=True)
        self._seed = seed
        self._drawn = 0

    def __len__(self) -> int:
        return len(self._slot)

    def uniform(self, *shape: int, parts: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(parts · B, *shape), 0 < value < 1: the first part of every patch, then the second, …"""
        return self._draw(shape, parts, dtype, normal=False)

    def normal(self, *shape: int, parts: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(parts · B, *shape), as `uniform`."""
        return self._draw(shape, parts, dtype, normal=True)

    def _draw(self, shape: tuple[int, ...], parts: int, dtype: torch.dtype, *, normal: bool) -> torch.Tensor:
        numbers = random(self._slot, self._seed, self._drawn, parts, math.prod(shape), normal, dtype)
        self._drawn += 1
        return numbers.view(-1, *shape)
