"""Whether a CT shows a head: its face can be rendered from the voxels, so such a scan tells who it is."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from mixcl_dist.data_shards.volume import Volume

GRID_MM = 3.0
BONE_HU = 200
CLOSED_MM = 6
"""Gaps in the skull that are bridged, on either side: sutures, foramina and what a thick slice blurs."""
BRAIN_HU = (-20, 100)
MIN_BRAIN_CM2 = 20.0
"""The spinal canal is below 4 cm², a cut through the brain above the ears 150 cm²."""


def shows_face(volume: Volume) -> bool:
    """Whether some axial cut shows soft tissue of the size of a brain, shut in by bone.

    Ribs and pelvis are hardly ever closed to a ring within one cut. Of OpenKBP's 203 heads and necks more than nine of
    ten are recognised; the others are cut so far inside the skin that the skull is gone, and a lower face without a
    skull is missed as well.
    """
    x, y, z = (max(1, round(GRID_MM / spacing)) for spacing in volume.spacing)
    coarse = volume.hu[::x, ::y, ::z]
    pixel_mm = (volume.spacing[0] * x, volume.spacing[1] * y)
    return any(_brain_cm2(coarse[:, :, k], pixel_mm) >= MIN_BRAIN_CM2 for k in range(coarse.shape[2]))


def _brain_cm2(hu: np.ndarray, pixel_mm: tuple[float, float]) -> float:
    """The largest region of soft tissue that bone encloses in one axial cut."""
    steps = max(1, round(CLOSED_MM / max(pixel_mm)))
    shell = ndimage.binary_closing(np.pad(hu > BONE_HU, steps), iterations=steps)[steps:-steps, steps:-steps]
    regions, count = ndimage.label(ndimage.binary_fill_holes(shell) & ~shell)
    if not count:
        return 0.0
    soft = ndimage.median(hu, regions, np.arange(1, count + 1))
    area = np.bincount(regions.ravel())[1:] * np.prod(pixel_mm) / 100
    return float(max(area[(soft > BRAIN_HU[0]) & (soft < BRAIN_HU[1])], default=0.0))
