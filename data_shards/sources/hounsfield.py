"""Are these numbers HU? Files do not say, so the histogram is looked at before anything is made of it.

In a CT in HU fat and soft tissue, with contrast the blood, make its highest peak above the lung, between -200 and 700;
air lies around -1000, and what lies below -1024 are a few constants that mark the outside of the field of view, with
what interpolation made of their edges. Raw stored values, an intercept that was subtracted twice, values ten times as
large, and inverted ones break this; the limits leave room for every cut-out of a CT, of lung, heart or skull alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage

from mixcl_dist.data_shards.volume import AIR_HU, CaseError, hu_counts

HU = np.arange(-(1 << 15), 1 << 15)
FAT_HU, SOFT_TISSUE_HU = -50, -300
"""Any CT, even cut out around an organ, has voxels of fat, lung or bowel gas below the first and of tissue
above the second. Masks, PET and MR have none below; a CT stored with 1024 added neither."""
MIN_SHARE = 1e-3
MIN_VALUES = 50
TISSUE_HU = (-200, 700)
"""Where tissue may peak: fat alone to a ventricle full of contrast."""
LUNG_HU, MIN_LUNG = (-900, -300), 0.3
"""A scan with so much lung, and its highest peak there, need not have a peak of tissue."""
RAW_HU, VALLEY_HU, MAX_RAW, MAX_RISE = (850, 1250), (450, 750), 0.1, 4.0
"""Bone falls off towards the first; where so large a share lies, and rises so much from the second, is a peak."""
HUGE_HU, MAX_HUGE = 4000, 0.01
"""Metal is at the end of a scanner's range, 3071 or four times that, and small."""
BINS = 61
"""HU that a peak below air takes, noise included."""
MAX_BELOW, EDGE_HU, MAX_CONSTANTS = 0.05, 150, 3
"""Share of voxels in one such peak; how far interpolation overshoots a constant; constants that mark an outside."""
SIGMA_HU, REACH = 15, 60
"""Of the blur before peaks are looked for; it reaches over four sigmas."""
CURE = "leave it out, or convert it again from DICOM, with slope and intercept applied once"


def check_hu(voxels: np.ndarray, where: Path) -> None:
    """Raise `CaseError` unless `voxels` (any shape of three axes, any number type), as stored, can be CT in HU."""
    counts = _counts(voxels)
    for what in _doubts(counts):
        raise CaseError(what, where=where, cure=CURE)


def _counts(voxels: np.ndarray) -> np.ndarray:
    """How many voxels have each of `HU`; what lies beyond counts at the ends."""
    if voxels.dtype == np.int16:
        return hu_counts(voxels)
    counts = np.zeros(len(HU), np.int64)
    for plane in voxels.T if voxels.flags.f_contiguous else voxels:
        whole = plane if plane.dtype.kind in "iu" else np.rint(plane)
        counts += hu_counts(np.clip(whole, HU[0], HU[-1]).astype(np.int16))
    return counts


def _doubts(counts: np.ndarray) -> Iterator[str]:
    """Why the values are not HU, in words that say what was seen."""
    inside = np.where(HU > AIR_HU, counts, 0)
    total = max(1, inside.sum())
    if np.count_nonzero(inside) < MIN_VALUES:
        yield f"has only {np.count_nonzero(inside)} different values: a mask rather than a CT"
    below = _without_constants(np.where(HU <= AIR_HU, counts, 0))
    peaks = ndimage.uniform_filter1d(below.astype(float), BINS, mode="constant") * BINS
    peaks[HU > AIR_HU - BINS] = 0
    if (share := peaks.max() / (total + below.sum())) > MAX_BELOW:
        many, most = np.count_nonzero(below[HU < AIR_HU]), HU[peaks.argmax()]
        yield f"has {many} different values below {AIR_HU}, {share:.0%} of its voxels around {most}: not a CT in HU"
    if inside[HU <= FAT_HU].sum() < MIN_SHARE * total:
        yield f"has next to nothing below {FAT_HU} HU, so no air or fat: not a CT in HU"
    tissue = np.where(HU > SOFT_TISSUE_HU, inside, 0)
    if tissue.sum() < MIN_SHARE * total:
        yield f"has next to nothing above {SOFT_TISSUE_HU} HU: only air"
    lung = inside[_within(LUNG_HU)].sum() > MIN_LUNG * (total + below.sum())
    lung = lung and _within(LUNG_HU)[_smooth(inside).argmax()]
    yield from _tissue_doubts(tissue / max(1, tissue.sum()), lung)


def _tissue_doubts(tissue: np.ndarray, lung: bool) -> Iterator[str]:
    """The same of the shares of voxels at each HU above the lung's; `lung` is whether that may be all there is."""
    smooth = _smooth(tissue)
    smooth[HU <= SOFT_TISSUE_HU] = 0
    peak = HU[smooth.argmax()]
    if peak > TISSUE_HU[1] or (peak < TISSUE_HU[0] and not lung):
        yield f"has its highest peak above the lung at {peak}, where tissue lies around 0 in HU: not a CT in HU"
    raw = _within(RAW_HU)
    second = smooth[raw].max()
    if tissue[raw].sum() > MAX_RAW and second > MAX_RISE * smooth[_within(VALLEY_HU)].min():
        at = HU[raw][smooth[raw].argmax()]
        yield f"has peaks at {peak} and {at}, where air and tissue lie around -1000 and 0 in HU: not a CT in HU"
    if (huge := tissue[HU > HUGE_HU].sum()) > MAX_HUGE:
        yield f"has {huge:.0%} of its tissue above {HUGE_HU} HU: not a CT in HU"


def _smooth(shares: np.ndarray) -> np.ndarray:
    """`shares` at each of `HU`, blurred by `SIGMA_HU`; only where there are any, as most of `HU` is in no CT."""
    smooth = np.zeros(len(HU))
    if len(there := np.flatnonzero(shares)):
        span = slice(max(0, there[0] - REACH), there[-1] + REACH + 1)
        smooth[span] = ndimage.gaussian_filter1d(shares[span].astype(float), sigma=SIGMA_HU)
    return smooth


def _without_constants(below: np.ndarray) -> np.ndarray:
    """Counts without up to three values that stand out of their neighbours, nor what interpolation makes of them."""
    left = below.copy()
    for _ in range(MAX_CONSTANTS):
        at = int(left.argmax())
        beside = np.r_[left[max(0, at - 20) : max(0, at - 2)], left[at + 3 : at + 21]]
        if left[at] >= 5 * beside.max(initial=0):
            left[max(0, at - EDGE_HU) : at + EDGE_HU + 1] = 0
    return left


def _within(limits: tuple[int, int]) -> np.ndarray:
    return (limits[0] < HU) & (limits[1] > HU)
