"""A network slid over a CT of any size: its logits as slabs, a few planes at once, and classes on the CT's own grid.

Logits of all classes of a whole CT are never in memory together: 100 classes of 400³ voxels would take 26 GB. What is
held of them is as many planes as a window is thick, along the longest axis, where planes are smallest.

Legend: K + 1 classes with the background, (n, y, z) planes of a slab, the first axis being the one that is slid along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor
from torch.nn import functional as F

AIR = -1.0
"""What lies beyond an image, in the network's input range."""
WINDOWS_AT_ONCE = 2
Predictor = Callable[[Tensor], Tensor]
"""(B, 1, x, y, z) normalised → logits (B, K + 1, x, y, z)."""
Keeper = Callable[[int, Tensor], None]
"""Called with a class and its probabilities in further planes (n, y, z) float32, from the first plane to the last."""


def slabs(
    predict: Predictor, image: Tensor, patch_size: Sequence[int], overlap: float, joined_on: torch.device
) -> Iterator[Tensor]:
    """Logits (K + 1, n, y, z) float32 on `joined_on` of an image (x, y, z), from its first plane to its last, each as
    soon as no window to come reaches it.

    Windows of `patch_size` have `overlap` of their edge in common with the next one, at least, and count by a Gaussian
    around their middle, as MONAI's sliding window has it. An image smaller than a window is padded with air.
    """
    missing = [max(0, edge - n) for edge, n in zip(patch_size, image.shape, strict=True)]
    before = [n // 2 for n in missing]
    inside = tuple(slice(first, first + n) for first, n in zip(before, image.shape, strict=True))
    sides = [(first, n - first) for first, n in zip(before, missing, strict=True)]
    padded = F.pad(image, [n for pair in reversed(sides) for n in pair], value=AIR)
    for first, finished in _joined(predict, padded, patch_size, overlap, joined_on):
        wanted = slice(max(0, inside[0].start - first), max(0, inside[0].stop - first))
        if (part := finished[:, wanted, inside[1], inside[2]]).shape[1]:
            yield part


def _joined(
    predict: Predictor, image: Tensor, patch_size: Sequence[int], overlap: float, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """The first plane and the logits of each slab of an image that is nowhere smaller than a window."""
    steps = [
        edge if edge == n else max(1, int(edge * (1 - overlap)))
        for edge, n in zip(patch_size, image.shape, strict=True)
    ]
    windows = dense_patch_slices(image.shape, patch_size, steps)
    weight = compute_importance_map(tuple(patch_size), mode="gaussian", device=device)
    rows = [(start, list(row)) for start, row in groupby(windows, key=lambda window: window[0].start)]
    sums = total = torch.empty(0)
    for (start, row), (end, _) in zip(rows, [*rows[1:], (image.shape[0], [])], strict=True):
        for some in (row[n : n + WINDOWS_AT_ONCE] for n in range(0, len(row), WINDOWS_AT_ONCE)):
            logits = predict(torch.stack([image[window] for window in some])[:, None])
            if not sums.numel():
                depth = (patch_size[0], *image.shape[1:])
                sums = torch.zeros((logits.shape[1], *depth), device=device)
                total = torch.zeros(depth, device=device)
            for window, found in zip(some, logits, strict=True):
                sums[:, :, *window[1:]].addcmul_(found.to(device, torch.float32), weight)
                total[:, *window[1:]] += weight
        yield start, sums[:, : end - start] / total[: end - start]
        for held in (sums, total[None]):
            left = patch_size[0] - (end - start)
            held[:, :left] = held[:, end - start :].clone()
            held[:, left:] = 0


def classes_on_grid(
    slabs: Iterable[Tensor],
    to_logits: np.ndarray,
    shape: Sequence[int],
    seen_shape: Sequence[int],
    device: torch.device,
    keep: Keeper | None = None,
) -> Tensor:
    """The class with the largest logit of every voxel of a grid of `shape`, uint8 on `device`.

    `slabs` are the logits of a grid of `seen_shape`; `to_logits` (4, 4) maps an index of the first grid to one of the
    second, which is parallel to it. Logits are interpolated linearly; beyond their grid its border voxel is repeated.
    `keep` is given the probabilities.
    """
    label = torch.zeros(tuple(shape), dtype=torch.uint8, device=device)
    for begin, logits, axes in _resampled(slabs, to_logits, shape, seen_shape):
        along = [axis.on(device) for axis in axes]
        found = label[begin : begin + len(axes[0].lower)]
        best = torch.full(tuple(found.shape), -torch.inf, device=device)
        log_sum = torch.full_like(best, -torch.inf) if keep else None
        for number, channel in enumerate(logits):  # one class at a time: on a finer grid all would not fit
            value = _interpolated(channel.to(device), along)
            found.masked_fill_(value > best, number)
            torch.maximum(best, value, out=best)
            if log_sum is not None:
                log_sum = torch.logaddexp(log_sum, value)
        if keep is not None and log_sum is not None:
            for number, channel in enumerate(logits):
                keep(number, (_interpolated(channel.to(device), along) - log_sum).exp_())
    return label


@dataclass(frozen=True)
class _Axis:
    """Linear interpolation along an axis: the two old voxels that make each new one, and the share of the second."""

    lower: np.ndarray
    upper: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, step: float, offset: float, size: int, old_size: int) -> _Axis:
        """New voxel n lies at `offset` + `step` · n of `old_size` old ones, or at the border nearest to that."""
        position = offset + step * np.arange(size)
        whole = np.rint(position)
        position = np.where(np.abs(position - whole) < 1e-4, whole, position).clip(0, old_size - 1)
        lower = position.astype(np.int64)
        return cls(lower, np.ceil(position).astype(np.int64), (position - lower).astype(np.float32))

    def part(self, begin: int, end: int, first: int) -> _Axis:
        """New voxels from `begin` to `end`, where old voxel `first` is the first at hand."""
        return _Axis(self.lower[begin:end] - first, self.upper[begin:end] - first, self.share[begin:end])

    def on(self, device: torch.device) -> tuple[Tensor, ...] | None:
        """The same as tensors, None where every old voxel is the new one at its place."""
        if not self.share.any() and np.array_equal(self.lower, np.arange(len(self.lower))):
            return None
        return tuple(torch.from_numpy(each).to(device) for each in (self.lower, self.upper, self.share))


def _resampled(
    slabs: Iterable[Tensor], to_logits: np.ndarray, shape: Sequence[int], seen_shape: Sequence[int]
) -> Iterator[tuple[int, Tensor, list[_Axis]]]:
    """The first of some further planes of a grid, the logits (K + 1, n, y, z) that they lie between, and how each axis
    comes about from those."""
    along = [_Axis.of(*of) for of in zip(np.diag(to_logits), to_logits[:3, 3], shape, seen_shape, strict=False)]
    lower, upper = along[0].lower, along[0].upper
    held, first, done = None, 0, 0
    for slab in slabs:
        held = slab if held is None else torch.cat([held, slab], dim=1)
        ready = int(np.searchsorted(upper, first + held.shape[1]))
        if ready == done:
            continue
        begin, end = int(lower[done]), int(upper[ready - 1]) + 1
        yield done, held[:, begin - first : end - first], [along[0].part(done, ready, begin), *along[1:]]
        if ready == len(lower):
            return
        held, first, done = held[:, int(lower[ready]) - first :], int(lower[ready]), ready


def _interpolated(field: Tensor, along: Sequence[tuple[Tensor, ...] | None]) -> Tensor:
    for dim in (2, 1, 0):  # the last first: the field is largest where whole planes are copied
        if (axis := along[dim]) is not None:
            lower, upper, share = axis
            ends = field.index_select(dim, lower), field.index_select(dim, upper)
            field = torch.lerp(*ends, share.view(-1, *[1] * (2 - dim)))
    return field
