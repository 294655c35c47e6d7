"""Training crops of a few labelled CTs, cut and augmented batch by batch on the device that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.intensity import normalise

CENTRED_SHARE = 0.5
"""Share of the crops that are drawn around a voxel of a class; the others may lie anywhere."""
MARGIN = 1.25
"""A crop is cut larger than needed by this factor, so that rotating it brings in anatomy instead of padding."""
AIR_HU = -1024
VOXELS_PER_CLASS = 20_000
ROTATION, SCALE = 0.2, 0.1
"""Largest turn about each axis, in radians, and largest change of scale along it."""
GAIN, SHIFT_HU, NOISE_HU = 0.1, 20.0, 15.0
GAIN_SHARE, SHIFT_SHARE, NOISE_SHARE = 0.5, 0.5, 0.3
"""Shares of the crops whose intensities are so changed."""
RESIDENT_BYTES = 2 << 30
"""Volumes lie on the device up to this size together, beyond it in main memory: a table's trials share a GPU."""


@dataclass(frozen=True, eq=False)
class LabelledVolume:
    """A training case on the grid that the network works on."""

    hu: np.ndarray
    """(X, Y, Z) int16."""
    target: np.ndarray
    """(X, Y, Z) uint8 in 0 … K, or `IGNORED`; 0 wherever none of the known classes lies."""
    known: np.ndarray
    """(K + 1,) bool; which classes were reliably annotated, entry 0 (background) False."""


@dataclass(frozen=True)
class CropBatch:
    image: Tensor
    """(B, 1, x, y, z) float32 normalised."""
    target: Tensor
    """(B, 1, x, y, z) int64 in 0 … K, or `IGNORED`."""
    known: Tensor
    """(B, K + 1) bool."""


class Crops:
    """Random augmented crops on `device`; a sequence of batches is a pure function of volumes, seed and device type.

    The host draws places and parameters and sends them without waiting; noise is drawn on the device.
    No mirroring: left and right organs are different classes.
    """

    def __init__(
        self,
        volumes: Sequence[LabelledVolume],
        size: Sequence[int],
        window_hu: tuple[float, float],
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._size = tuple(size)
        self._cut_size = np.array([round(n * MARGIN) for n in size])
        self._window_hu = window_hu
        self._device = torch.device(device)
        self._rng = np.random.default_rng(seed)
        self._noise = torch.Generator(self._device).manual_seed(seed)
        self._voxels = _voxels_by_class(volumes, self._rng)
        resident = sum(volume.hu.nbytes + volume.target.nbytes for volume in volumes) <= RESIDENT_BYTES
        home = self._device if resident else "cpu"
        self._hu = [torch.from_numpy(volume.hu).to(home) for volume in volumes]
        self._target = [torch.from_numpy(volume.target).to(home) for volume in volumes]
        self._known = [torch.from_numpy(volume.known).to(self._device) for volume in volumes]

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence of batches stands."""
        return {"places": self._rng.bit_generator.state, "noise": self._noise.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rng.bit_generator.state = state["places"]
        self._noise.set_state(state["noise"])

    def batch(self, count: int) -> CropBatch:
        numbers, starts = zip(*(self._place() for _ in range(count)), strict=True)
        hu = self._cut([self._hu[number] for number in numbers], starts, AIR_HU)
        target = self._cut([self._target[number] for number in numbers], starts, 0)
        noise = torch.randn((count, 1, *self._size), generator=self._noise, device=self._device)
        image, target = augment(normalise(hu, self._window_hu), target, self._parameters(count), noise)
        return CropBatch(image, target.long(), torch.stack([self._known[number] for number in numbers]))

    def _place(self) -> tuple[int, np.ndarray]:
        """Number of a volume and the first voxel of a cut in it; classes come equally often, however large they are."""
        if self._voxels and self._rng.random() < CENTRED_SHARE:
            of_class = self._voxels[self._rng.choice(list(self._voxels))]
            number = int(self._rng.choice(list(of_class)))
            centre = self._rng.choice(of_class[number])
            jitter = self._rng.integers(-self._cut_size // 4, self._cut_size // 4 + 1)
            return number, centre - self._cut_size // 2 + jitter
        number = int(self._rng.integers(len(self._hu)))
        room = np.array(self._hu[number].shape) - self._cut_size
        return number, self._rng.integers(np.minimum(room, 0), np.maximum(room, 0) + 1)

    def _cut(self, volumes: Sequence[Tensor], starts: Sequence[np.ndarray], outside: int) -> Tensor:
        """(B, 1, X, Y, Z): each volume from its start on, with `outside` where that lies beyond the volume."""
        home = volumes[0]
        cuts = torch.full((len(volumes), 1, *self._cut_size), outside, dtype=home.dtype, device=home.device)
        for cut, volume, start in zip(cuts, volumes, starts, strict=True):
            low, high = (np.clip(edge, 0, volume.shape) for edge in (start, start + self._cut_size))
            cut[0][_box(low - start, high - start)] = volume[_box(low, high)]
        return cuts.to(self._device, non_blocking=True)

    def _parameters(self, count: int) -> Tensor:
        """(B, 15) on the device, see `augment`, in one copy that the host does not wait for."""
        matrix = sampling_matrix(draw_linear(self._rng, count), self._cut_size, self._size)
        intensity = draw_intensity(self._rng, count, 2 / (self._window_hu[1] - self._window_hu[0]))
        parameters = torch.empty((count, 15), pin_memory=self._device.type == "cuda")
        parameters.numpy()[:] = np.hstack([matrix.reshape(count, 12), intensity])
        return parameters.to(self._device, non_blocking=True)


def augment(image: Tensor, target: Tensor, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Turn, scale and crop, then change the intensities of every image of a batch in its own way.

    `image` (B, 1, X, Y, Z) float32 normalised, interpolated linearly; `target` (B, 1, X, Y, Z), of which the nearest
    voxel is taken; beyond both, the border voxel is repeated. `parameters` (B, 15) float32: a `sampling_matrix`, gain,
    shift and standard deviation of the noise. `noise` (B, 1, x, y, z) float32 standard normal. Returns float32 image
    in [-1, 1] and target, both of the noise's shape.
    """
    matrix, intensity = parameters.split((12, 3), dim=1)
    gain, shift, deviation = intensity[..., None, None, None, None].unbind(1)
    grid = F.affine_grid(matrix.reshape(-1, 3, 4), list(noise.shape), align_corners=False)
    image = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
    nearest = F.grid_sample(target.float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    return (image * gain + shift).addcmul_(noise, deviation).clamp_(-1, 1), nearest


def draw_linear(rng: np.random.Generator, count: int) -> np.ndarray:
    """(B, 3, 3) float64: scaling along the axes, then turns about the third, second and first of them."""
    angle = rng.uniform(-ROTATION, ROTATION, (3, count))
    scale = rng.uniform(1 - SCALE, 1 + SCALE, (count, 1, 3))
    about_first, about_second, about_third = (_turn(axis, angle[axis]) for axis in range(3))
    return about_first @ about_second @ about_third * scale


def draw_intensity(rng: np.random.Generator, count: int, per_hu: float) -> np.ndarray:
    """(B, 3) float64: gain, shift and the noise's standard deviation, of intensities with `per_hu` to one HU."""
    changed = rng.random((count, 3)) < (GAIN_SHARE, SHIFT_SHARE, NOISE_SHARE)
    low, high = (-GAIN, -SHIFT_HU * per_hu, 0), (GAIN, SHIFT_HU * per_hu, NOISE_HU * per_hu)
    return (1, 0, 0) + changed * rng.uniform(low, high, (count, 3))


def sampling_matrix(linear: np.ndarray, cut_size: ArrayLike, size: ArrayLike) -> np.ndarray:
    """(B, 3, 4) for `affine_grid`: `linear` (B, 3, 3) takes a voxel of a crop of `size` to one of its cut, both counted
    from the middle."""
    # `affine_grid` counts axes backwards and runs from -1 to 1 between the outer edges.
    matrix = linear * (np.array(size) / np.array(cut_size)[:, None])
    return np.concatenate([matrix[:, ::-1, ::-1], np.zeros((len(matrix), 3, 1))], axis=2)


def _turn(axis: int, angle: np.ndarray) -> np.ndarray:
    """(B, 3, 3): turns by `angle` (B,) in radians about one axis."""
    matrix = np.zeros((len(angle), 3, 3))
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix[:, axis, axis] = 1
    matrix[:, first, first] = matrix[:, second, second] = np.cos(angle)
    matrix[:, second, first] = np.sin(angle)
    matrix[:, first, second] = -matrix[:, second, first]
    return matrix


def _box(low: np.ndarray, high: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))


def _voxels_by_class(volumes: Sequence[LabelledVolume], rng: np.random.Generator) -> dict[int, dict[int, np.ndarray]]:
    """Class → number of a volume → (N, 3) indices of voxels of that class, at most `VOXELS_PER_CLASS` of them."""
    found: dict[int, dict[int, np.ndarray]] = {}
    for number, volume in enumerate(volumes):
        for label in np.setdiff1d(volume.target, (0, IGNORED)).tolist():
            voxels = np.argwhere(volume.target == label)
            if len(voxels) > VOXELS_PER_CLASS:
                voxels = rng.choice(voxels, VOXELS_PER_CLASS, replace=False)
            found.setdefault(label, {})[number] = voxels
    return found
