"""Small tensors that every step needs, made once on each device, as a copy from the host may wait for the device."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=256)
def constant(values: tuple | float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`values`, a number or nested tuples, as a tensor; not to be written to."""
    return torch.tensor(values, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def lattice(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(∏ shape, len(shape)) int64: every index of a box, the last axis fastest; not to be written to."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in shape)).view(-1, len(shape))


def forget() -> None:
    """Make all anew: tensors of a `FakeTensorMode` are of no use outside it, nor others within it."""
    constant.cache_clear()
    lattice.cache_clear()
