"""Training crops of a few labelled CTs that are kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandAffined,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from torch import Tensor

from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.intensity import normalise

CENTRED_SHARE = 0.5
"""Share of the crops that are drawn around a voxel of a class; the others may lie anywhere."""
MARGIN = 1.25
"""A crop is cut larger than needed by this factor, so that rotating it brings in anatomy instead of padding."""
AIR_HU = -1024
VOXELS_PER_CLASS = 20_000
SHIFT_HU, NOISE_HU = 20.0, 15.0


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
    """(B, 1, x, y, z) int64 in 0 … K."""
    known: Tensor
    """(B, K + 1) bool."""


class Crops:
    """Random augmented crops; a sequence of batches is a pure function of volumes and seed.

    No mirroring: left and right organs are different classes.
    """

    def __init__(
        self,
        volumes: Sequence[LabelledVolume],
        size: Sequence[int],
        window_hu: tuple[float, float],
        seed: int,
    ) -> None:
        self._volumes = volumes
        self._size = np.array([round(n * MARGIN) for n in size])
        self._window_hu = window_hu
        self._rng = np.random.default_rng(seed)
        self._voxels = _voxels_by_class(volumes, self._rng)
        self._augment = _augmentation(size, window_hu).set_random_state(seed)

    def batch(self, count: int) -> CropBatch:
        crops = [self._crop(*self._place()) for _ in range(count)]
        image, target, known = zip(*crops, strict=True)
        return CropBatch(torch.stack(image), torch.stack(target), torch.stack(known))

    def _place(self) -> tuple[LabelledVolume, np.ndarray]:
        """A volume and the first voxel of a crop in it; classes come equally often, however large they are."""
        if self._voxels and self._rng.random() < CENTRED_SHARE:
            of_class = self._voxels[self._rng.choice(list(self._voxels))]
            number = self._rng.choice(list(of_class))
            centre = self._rng.choice(of_class[number])
            jitter = self._rng.integers(-self._size // 4, self._size // 4 + 1)
            return self._volumes[number], centre - self._size // 2 + jitter
        volume = self._volumes[int(self._rng.integers(len(self._volumes)))]
        room = np.array(volume.hu.shape) - self._size
        return volume, self._rng.integers(np.minimum(room, 0), np.maximum(room, 0) + 1)

    def _crop(self, volume: LabelledVolume, start: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        hu = torch.from_numpy(_cut(volume.hu, start, self._size, AIR_HU))
        target = torch.from_numpy(_cut(volume.target, start, self._size, 0)).float()
        crop = self._augment({"image": normalise(hu, self._window_hu)[None], "target": target[None]})
        image = crop["image"].as_tensor().clamp(-1, 1)
        return image, crop["target"].as_tensor().long(), torch.from_numpy(volume.known)


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


def _cut(array: np.ndarray, start: np.ndarray, size: np.ndarray, outside: int) -> np.ndarray:
    """`array[start : start + size]` with `outside` where that lies beyond the array."""
    cut = np.full(size, outside, dtype=array.dtype)
    low = np.clip(start, 0, array.shape)
    high = np.clip(start + size, 0, array.shape)
    within = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
    cut[within] = array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return cut


def _augmentation(size: Sequence[int], window_hu: tuple[float, float]) -> Compose:
    per_hu = 2 / (window_hu[1] - window_hu[0])
    return Compose(
        [
            RandAffined(
                keys=("image", "target"),
                prob=1.0,
                rotate_range=(0.2, 0.2, 0.2),  # radians
                scale_range=(0.1, 0.1, 0.1),
                spatial_size=tuple(size),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            RandScaleIntensityd(keys="image", factors=0.1, prob=0.5),
            RandShiftIntensityd(keys="image", offsets=SHIFT_HU * per_hu, prob=0.5),
            RandGaussianNoised(keys="image", std=NOISE_HU * per_hu, prob=0.3),
        ]
    )
