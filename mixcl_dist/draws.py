"""Random numbers of a batch, patch by patch: each patch has its own source, named by the run's seed and its slot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class Draws:
    """Sources of random numbers for B patches.

    What a patch is given depends on (seed, slot) and the draws before alone, not on the patches beside it: so a run
    repeats its views on any number of ranks, and after any stop.
    """

    def __init__(self, seed: int, slots: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._generators = [torch.Generator(self.device).manual_seed(_seed(seed, slot)) for slot in slots]

    def __len__(self) -> int:
        return len(self._generators)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """(B, *shape), 0 <= value < 1."""
        return self._each(torch.rand, shape, dtype)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """(B, *shape)."""
        return self._each(torch.randn, shape, dtype)

    def exponential(self, *shape: int) -> torch.Tensor:
        """(B, *shape) float64, of rate 1."""
        return -torch.log1p(-self.uniform(*shape))

    def whole(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Whole numbers, each of `low` … `high` inclusive, both (B, …), equally likely."""
        return low + (self.uniform(*low.shape[1:]) * (high - low + 1)).floor()

    def _each(self, draw, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.stack([draw(shape, generator=g, device=self.device, dtype=dtype) for g in self._generators])


def _seed(seed: int, slot: int) -> int:
    high, low = np.random.SeedSequence([seed, slot]).generate_state(2, np.uint32)
    return int(high) << 31 | int(low) >> 1
