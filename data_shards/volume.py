"""One CT volume: HU and label on a grid that says where each voxel lies in the patient.

Arrays are (X, Y, Z) and, once `to_ras` has been applied, index grows towards the patient's Right, Anterior
and Superior. Affines map a voxel's index to RAS+ millimetres, as NIfTI and nibabel have it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from mixcl_dist.data_shards.errors import DataError

AIR_HU = -1024
BODY_HU = -500
"""Above this a voxel is tissue rather than air; lung lies below and is enclosed by what lies above."""
MIN_SPACING_MM, MAX_SPACING_MM = 0.05, 50.0
"""Beyond these a header is wrong, for instance in metres."""
MAX_SHEAR_DEG = 0.5
"""Over a 300 mm field half a degree shifts a voxel by 2.6 mm, about one slice."""
_COUNTED = 1 << 20
"""Voxels that are counted at once; each takes eight bytes meanwhile."""


class CaseError(DataError):
    """A case that cannot be used; `str()` is one line: where, what is wrong, what to do about it."""

    def __init__(self, what: str, *, where: Path, cure: str) -> None:
        self.what, self.where, self.cure = shown(what), Path(where), shown(cure)
        super().__init__(" ".join(f"{shown(self.where)}: {self.what}; {self.cure}".split()))

    def __reduce__(self):  # the keyword arguments do not survive default pickling between processes
        return _case_error, (self.what, self.where, self.cure)


def shown(path: Path | str) -> str:
    """`path`, or a message that holds one, in text that can be written anywhere, bytes that are not UTF-8 as \\xfc."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _case_error(what: str, where: Path, cure: str) -> CaseError:
    return CaseError(what, where=where, cure=cure)


@dataclass(frozen=True, eq=False)
class Volume:
    """A CT of one patient in HU, with the organs that are known of it."""

    hu: np.ndarray
    """(X, Y, Z) int16 HU."""
    affine: np.ndarray
    """(4, 4) float64, voxel index → RAS+ mm."""
    label: np.ndarray | None = None
    """(X, Y, Z) uint8; value k > 0 is the k-th class of the catalogue, 255 (`IGNORED`) a voxel of unknown class."""

    def __post_init__(self) -> None:
        assert self.hu.dtype == np.int16 and self.hu.ndim == 3 and self.affine.shape == (4, 4)
        assert self.label is None or (self.label.dtype == np.uint8 and self.label.shape == self.hu.shape)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between neighbouring voxels along each axis."""
        return spacing_of(self.affine)


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))
    return x, y, z


def check_affine(affine: np.ndarray, where: Path, unit: str = "mm") -> None:
    """Raise `CaseError` unless `affine` (→ mm) is a grid of right angles with a spacing that a CT can have.

    `unit` is the header's own unit of length, which the message names.
    """
    spacing = spacing_of(affine)
    if not np.isfinite(affine).all() or not all(MIN_SPACING_MM <= s <= MAX_SPACING_MM for s in spacing):
        shown = " x ".join(f"{s:g}" for s in spacing)
        stated = "" if unit == "mm" else f" (the header gives lengths in {unit})"
        cure = "correct the header or convert the scan again"
        raise CaseError(f"spacing of {shown} mm is impossible{stated}", where=where, cure=cure)
    directions = affine[:3, :3] / spacing
    cosines = directions.T @ directions - np.eye(3)
    shear = math.degrees(math.asin(min(1.0, float(np.abs(cosines).max()))))
    if shear > MAX_SHEAR_DEG:
        raise CaseError(
            f"slices are sheared by {shear:.1f} degrees (gantry tilt)",
            where=where,
            cure="resample the scan to a grid with right angles, or leave it out",
        )


def check_voxels(voxels: np.ndarray, where: Path) -> None:
    """Raise `CaseError` unless `voxels` are a volume of finite numbers."""
    if voxels.ndim != 3 or min(voxels.shape) < 2:
        shape = " x ".join(map(str, voxels.shape))
        split, stack = "write a file for each time, phase or channel", "stack its slices into a volume"
        cure = split if voxels.ndim > 3 else stack
        raise CaseError(f"a volume is needed, not {shape} voxels", where=where, cure=cure)
    if voxels.dtype.names:
        cure = "leave it out: it is a picture of a scan, not in HU"
        raise CaseError(f"voxels are colours ({', '.join(voxels.dtype.names)})", where=where, cure=cure)
    if voxels.dtype.kind not in "iuf":
        raise CaseError(f"voxels are {voxels.dtype}, not numbers", where=where, cure="convert the scan to HU")
    if voxels.dtype.kind == "f" and (bad := np.count_nonzero(~np.isfinite(voxels))):
        cure = "replace them, outside the scan by -1024"
        raise CaseError(f"{bad} voxels are NaN or infinite", where=where, cure=cure)


def to_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flip and swap axes so that they run Right, Anterior, Superior as nearly as possible.

    Only the order of voxels changes: an oblique rotation stays in the affine.
    """
    orientation = nib.io_orientation(affine)
    turned = nib.apply_orientation(array, orientation)
    return np.ascontiguousarray(turned), affine @ nib.orientations.inv_ornt_aff(orientation, array.shape)


def untilted(affine: np.ndarray) -> np.ndarray:
    """`affine` with its third axis at right angles to the other two, at the same distance of slices."""
    right = affine.copy()
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal /= np.linalg.norm(normal) or 1
    right[:3, 2] = normal * (normal @ affine[:3, 2])
    return right


def untilt(hu: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A stack of slices whose origins drift within their planes, on a grid with right angles.

    `hu` is (X, Y, Z) int16. Each slice stays in its plane and is moved there by linear interpolation, so nothing is
    blurred between slices; the grid grows until it holds them all, with air where none of them lies. A stack within
    `MAX_SHEAR_DEG` of right angles is returned as it is.
    """
    shifts, grown, right = _upright(hu.shape, affine)
    if shifts is None:
        return hu, affine
    moved = np.full((*(hu.shape[:2] + grown), hu.shape[2]), AIR_HU, np.int16)
    for k, shift in enumerate(shifts):
        padded = np.pad(hu[:, :, k].astype(np.float32), [(0, int(n)) for n in grown], constant_values=AIR_HU)
        moved[:, :, k] = np.rint(ndimage.shift(padded, shift, order=1, mode="constant", cval=AIR_HU))
    return moved, right


def _upright(shape: Sequence[int], affine: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """By how many voxels along X and Y `untilt` moves each slice (Z, 2), None where it leaves them; by how many the
    grid grows (2,); and its affine."""
    right = untilted(affine)
    step = np.linalg.solve(right, affine[:, 2])[:2]  # in voxels a slice, along X and Y
    if np.linalg.norm(step * spacing_of(affine)[:2]) <= math.tan(math.radians(MAX_SHEAR_DEG)) * spacing_of(right)[2]:
        return None, np.zeros(2, int), affine
    shifts = np.arange(shape[2])[:, None] * step
    lower = np.floor(shifts.min(axis=0)).astype(int)
    right[:3, 3] += right[:3, :2] @ lower
    return shifts - lower, np.ceil(shifts.max(axis=0)).astype(int) - lower, right


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of a scan's files lie, in their own order."""

    shape: tuple[int, ...]
    affine: np.ndarray
    """(4, 4) float64, voxel index → RAS+ mm; the third axis may be sheared by a tilted gantry."""
    untilts: bool
    """Whether the voxels go through `untilt`."""

    @property
    def upright(self) -> tuple[tuple[int, ...], np.ndarray]:
        """Shape and affine after that."""
        _, grown, affine = self._moved()
        return (self.shape[0] + int(grown[0]), self.shape[1] + int(grown[1]), self.shape[2]), affine

    def _moved(self) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        return _upright(self.shape, self.affine) if self.untilts else (None, np.zeros(2, int), self.affine)

    def from_ras(self, values: np.ndarray) -> np.ndarray:
        """What lies at the voxels that `to_ras` led to, (X, Y, Z) of any type, in the order of the files; where slices
        were moved, the nearest voxel."""
        shifts, _, affine = self._moved()
        ras = np.array([[0, 1], [1, 1], [2, 1]])
        stored = nib.apply_orientation(values, nib.orientations.ornt_transform(ras, nib.io_orientation(affine)))
        if shifts is None:
            return np.ascontiguousarray(stored)
        slices = np.empty(self.shape, values.dtype)
        for k, shift in enumerate(shifts):
            x, y = (np.rint(np.arange(n) + s).astype(int) for n, s in zip(self.shape, shift, strict=False))
            slices[:, :, k] = stored[:, :, k][np.ix_(x, y)]
        return slices


def antialiased(hu: np.ndarray, step: np.ndarray) -> np.ndarray:
    """`hu` (X, Y, Z) as float32, blurred along each axis that is about to lose resolution.

    `step` (3,) is the new voxel's edge in old voxels. A point spread as wide as the old voxel (full width at half
    maximum) becomes as wide as the new one.
    """
    sigma = np.sqrt(np.maximum(step**2 - 1, 0)) / math.sqrt(8 * math.log(2))
    return ndimage.gaussian_filter(hu.astype(np.float32), sigma, mode="nearest")


def resampled_grid(shape: Sequence[int], step: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Size of a grid of voxels `step` (3,) times as large that begins at the edge of one of `shape`, and the (4, 4) map
    of its indices to old ones: the first voxel's centre moves by half the difference of the two voxels."""
    size = tuple(int(n) for n in np.maximum(1, np.rint(np.asarray(shape) / step)))
    to_old = np.diag([*step, 1.0])
    to_old[:3, 3] = (step - 1) / 2
    return size, to_old


def resample(volume: Volume, spacing_mm: Sequence[float]) -> Volume:
    """The same field at another spacing (mm).

    HU are `antialiased` and then interpolated linearly. Labels take the nearest
    voxel. The new grid is the `resampled_grid`.
    """
    step = np.asarray(spacing_mm, dtype=float) / volume.spacing  # new voxel in old voxels
    if np.allclose(step, 1, atol=1e-4):
        return volume
    size, to_old = resampled_grid(volume.hu.shape, step)
    offset = to_old[:3, 3]
    hu = ndimage.affine_transform(
        antialiased(volume.hu, step), step, offset, output_shape=size, order=1, mode="nearest"
    )
    label = volume.label
    if label is not None:
        label = ndimage.affine_transform(label, step, offset, output_shape=size, order=0, mode="nearest")
    return Volume(np.rint(hu).astype(np.int16), volume.affine @ to_old, label)


def hu_counts(hu: np.ndarray) -> np.ndarray:
    """(65536,) int64: how many voxels of `hu`, int16 of any shape, have each value from -32768 on."""
    counts = np.zeros(1 << 16, np.int64)
    flat = hu.ravel(order="K").view(np.uint16)
    for begin in range(0, len(flat), _COUNTED):
        counts += np.bincount(flat[begin : begin + _COUNTED], minlength=len(counts))
    return np.roll(counts, 1 << 15)


def crop_to_body(volume: Volume, margin_mm: float) -> Volume:
    """The smallest box around everything but air, widened by `margin_mm` within the volume.

    A volume of nothing but air is returned whole.
    """
    body = volume.hu > BODY_HU
    across: np.ndarray = np.any(body, axis=0)
    inside = [np.flatnonzero(along) for along in (body.any(axis=(1, 2)), across.any(axis=1), across.any(axis=0))]
    if not len(inside[0]):
        return volume
    margin = np.ceil(margin_mm / np.array(volume.spacing)).astype(int)
    box = tuple(slice(max(0, at[0] - m), at[-1] + 1 + m) for at, m in zip(inside, margin, strict=True))
    shift = np.eye(4)
    shift[:3, 3] = [s.start for s in box]
    label = None if volume.label is None else np.ascontiguousarray(volume.label[box])
    return dataclasses.replace(
        volume, hu=np.ascontiguousarray(volume.hu[box]), affine=volume.affine @ shift, label=label
    )
