"""Refusals: every message names the argument and the value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_arguments(
    embeddings: Tensor,
    identity: Tensor,
    candidate_set: Tensor,
    set_table: Tensor,
    group: Tensor | None,
    temperature: Tensor | float,
    row_weight: Tensor | None,
    present: Tensor | None,
    identity_weight: float,
    label_weight: float,
) -> None:
    """Refuse wrong shapes, dtypes, devices and weights; reads no tensor's content, so it can be traced."""
    _check_tensor("embeddings", embeddings, (None, None), FLOATS, embeddings)
    rows = embeddings.shape[0]
    _check_tensor("identity", identity, (rows,), (torch.int64,), embeddings)
    _check_tensor("candidate_set", candidate_set, (rows,), INTEGERS, embeddings)
    _check_tensor("set_table", set_table, (None, None), (torch.bool,), embeddings)
    if group is not None:
        _check_tensor("group", group, (rows,), INTEGERS, embeddings)
    if row_weight is not None:
        _check_tensor("row_weight", row_weight, (rows,), FLOATS, embeddings)
    if present is not None:
        _check_tensor("present", present, (rows,), (torch.bool,), embeddings)
    if isinstance(temperature, Tensor):
        _check_tensor("temperature", temperature, (), FLOATS, embeddings)
    elif not 0 < temperature < math.inf:  # isfinite() would stop a compiler
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
    for name, weight in (("identity_weight", identity_weight), ("label_weight", label_weight)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}: expected a finite number >= 0, got {weight}")


def check_values(candidate_set: Tensor, set_table: Tensor, temperature: Tensor, row_weight: Tensor | None) -> None:
    """Refuse contents that have no meaning; waits for the device that holds the tensors."""
    if not (temperature > 0 and temperature.isfinite()):
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature.item()}")
    empty = ~set_table.any(1)
    if empty.any():
        raise ValueError(f"set_table: set {_first(empty)} has no class")
    outside = (candidate_set < 0) | (candidate_set >= len(set_table))
    if outside.any():
        row = _first(outside)
        raise ValueError(
            f"candidate_set: expected an index below {len(set_table)}, the sets of set_table, "
            f"got {candidate_set[row].item()} in row {row}"
        )
    if row_weight is not None:
        wrong = ~(row_weight.isfinite() & (row_weight >= 0))
        if wrong.any():
            row = _first(wrong)
            raise ValueError(f"row_weight: expected finite numbers >= 0, got {row_weight[row].item()} in row {row}")


def _first(mask: Tensor) -> int:
    return int(mask.to(torch.uint8).argmax())


def _check_tensor(
    name: str,
    value: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    embeddings: Tensor,
) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {value!r}")
    sizes = zip(value.shape, shape, strict=False)
    if value.dim() != len(shape) or any(size != want for size, want in sizes if want is not None):
        expected = tuple("any" if want is None else want for want in shape)
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if value.device != embeddings.device:
        raise ValueError(f"{name}: expected device {embeddings.device} of embeddings, got {value.device}")
