"""Does a contestant do what it is timed for? By its output alone, whatever its conventions are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch
from contestants import DEGRADATIONS, PER_HU, Contestant
from scipy import ndimage
from torch import Tensor

Make = Callable[[Collection[str]], Contestant]
SEEDS = range(12)
AFFINE_HU = 3.0  #: HU between neighbours differ by thousands, and positions are float32
RAMP_HU = 10.0  #: a voxel
COARSEST = 2.0  #: voxels of the view in one of the coarse


def why_not(make: Make, patch: Tensor) -> str | None:
    """What is wrong, or None. `make` gives a contestant that degrades in the ways named; `patch` is real."""
    lacks = make(()).lacks
    for name, check in CHECKS.items():
        if name in lacks:
            continue
        try:
            check(make, patch)
        except AssertionError as error:
            return f"{name}: {error}"
    return None


def check_crop(make: Make, patch: Tensor) -> None:
    """Ramps along the axes tell where each voxel was taken from; scipy has to find the same CT there."""
    contestant, edge = make(()), patch.shape[-1]
    patch = patch.clamp(-1000, 1000)
    mappings = []
    for seed in SEEDS[:3]:
        ramps = [ramp(edge, axis) for axis in range(3)]
        places = np.stack([in_hu(_clean(contestant, one, seed)) for one in ramps], axis=1) / RAMP_HU
        shown = in_hu(_clean(contestant, patch, seed))
        for place, view in zip(places, shown, strict=True):  # (3, x, y, z) and (x, y, z)
            inside = ((place > 0.5) & (place < edge - 1.5)).all(0)
            _assert(inside.mean() > 0.4, f"{inside.mean():.0%} of a view lie in the patch")
            mapping, worst = fitted(place[:, inside], np.argwhere(inside).T)
            _assert(worst < 0.01, f"places are {worst:.3f} voxels off any affine mapping")
            scales = np.linalg.svd(mapping[:, :3], compute_uv=False)
            _assert(scales.min() > 0.89 and scales.max() < 1.11, f"scales are {scales}")
            _assert(np.linalg.det(mapping[:, :3]) > 0, "a view is mirrored")
            _assert(abs(mapping[:, :3] - np.eye(3)).max() > 1e-3, "a view is not turned")
            index = np.stack([*np.indices(view.shape), np.ones(view.shape)]).reshape(4, -1)
            truth = ndimage.map_coordinates(patch[0, 0].double().numpy(), mapping @ index, order=1, mode="nearest")
            error = abs(truth.reshape(view.shape) - view)[inside].max()
            _assert(error < AFFINE_HU, f"{error:.1f} HU off scipy's values at the same places")
            mappings.append(mapping)
    _assert(all(abs(one - mappings[0]).max() > 1e-2 for one in mappings[1:]), "views lie at the same place")


def check_blur(make: Make, patch: Tensor) -> None:
    """What a point is spread to: its mass stays, and along each axis its variance grows by σ² ≤ 1."""
    point = torch.zeros_like(patch)  # of the value that some pad with
    middle = patch.shape[-1] // 2
    point[..., middle - 1 : middle + 2, middle - 1 : middle + 2, middle - 1 : middle + 2] = 900
    grown = []
    for clean, degraded in _pairs(make, "blur", point):
        before, after = clean.astype(float), degraded.astype(float)
        _assert(abs(after.sum() / before.sum() - 1) < 0.02, "a point's mass changes")
        grown += [variance(after, axis) - variance(before, axis) for axis in range(3)]
    _assert(min(grown) > -0.02 and max(grown) < 1.1, f"variances grow by {min(grown):.2f} to {max(grown):.2f} voxels²")
    _assert(max(grown) > 0.3, "nothing is blurred")


def check_low_resolution(make: Make, patch: Tensor) -> None:
    """Noise loses its power, and a slope stays where it is to less than a coarse voxel."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-900, 900, patch.shape, generator=generator).to(torch.int16)
    kept = [degraded.var() / clean.var() for clean, degraded in _pairs(make, "low_resolution", noise)]
    _assert(0.1 < np.mean(kept) < 0.95, f"{np.mean(kept):.0%} of the power of noise is kept")
    for axis in range(3):
        for clean, degraded in _pairs(make, "low_resolution", ramp(patch.shape[-1], axis)):
            error = np.median(abs(degraded - clean)) / PER_HU / RAMP_HU
            _assert(error < COARSEST, f"a slope is moved by {error:.2f} voxels")


def check_noise(make: Make, patch: Tensor) -> None:
    changes = [in_hu(degraded - clean) for clean, degraded in _pairs(make, "noise", torch.zeros_like(patch))]
    deviations = [float(change.std()) for change in changes]
    _assert(max(deviations) < 30.9, f"deviation is up to {max(deviations):.1f} HU, not 30")
    _assert(max(deviations) > 15, f"deviation is at most {max(deviations):.1f} HU")
    _assert(max(abs(change.mean()) for change in changes) < 1, "noise has a mean")


def check_shift(make: Make, patch: Tensor) -> None:
    changes = [in_hu(degraded - clean) for clean, degraded in _pairs(make, "shift", torch.zeros_like(patch))]
    _assert(max(change.std() for change in changes) < 0.1, "a shift differs between voxels")
    shifts = [float(change.mean()) for change in changes]
    _assert(max(map(abs, shifts)) < 50.1, f"shifts are up to {max(map(abs, shifts)):.1f} HU, not 50")
    _assert(max(shifts) - min(shifts) > 40, f"shifts differ by {max(shifts) - min(shifts):.1f} HU")


def check_mask(make: Make, patch: Tensor) -> None:
    shares = [(degraded == -1).mean() for _, degraded in _pairs(make, "mask", torch.zeros_like(patch))]
    _assert(abs(np.mean(shares) - 0.3) < 0.05, f"{np.mean(shares):.0%} of the voxels are masked, not 30 %")


def check_all(make: Make, patch: Tensor) -> None:
    """Together, in batches: form, range, and other numbers each time."""
    contestant = make(DEGRADATIONS)
    clean, degraded = contestant(torch.cat([patch, patch]).to(contestant.device))
    shape = (4, 1, *contestant.config.size)
    _assert(clean.shape == degraded.shape == shape, f"views are {tuple(degraded.shape)}, not {shape}")
    _assert(clean.dtype == degraded.dtype == torch.float32, f"views are {degraded.dtype}")
    largest = float(max(clean.abs().max(), degraded.abs().max()))
    _assert(largest < 1 + 1e-4, f"values lie beyond -1 and 1: {largest:.4g}")  # weights add up to 1 but for rounding
    _assert(float((clean - degraded).abs().mean()) > 0.01, "nothing is degraded")
    _assert(all(not torch.equal(clean[0], other) for other in clean[1:]), "views repeat")


CHECKS = {
    "crop": check_crop,
    "blur": check_blur,
    "low_resolution": check_low_resolution,
    "noise": check_noise,
    "shift": check_shift,
    "mask": check_mask,
    "all": check_all,
}


def ramp(edge: int, axis: int) -> Tensor:
    """(1, 1, X, Y, Z) int16: `RAMP_HU` times the index along an axis."""
    index = torch.arange(edge, dtype=torch.int16) * int(RAMP_HU)
    return index.view([-1 if one == axis else 1 for one in range(3)]).expand(1, 1, edge, edge, edge).contiguous()


def fitted(places: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, float]:
    """The affine mapping (3, 4) of (3, N) view voxels to places in the patch, and the largest error."""
    ones = np.concatenate([index, np.ones((1, index.shape[1]))])
    mapping = np.linalg.lstsq(ones.T, places.T, rcond=None)[0].T
    return mapping, float(abs(mapping @ ones - places).max())


def variance(mass: np.ndarray, axis: int) -> float:
    """Of a distribution along one axis, in voxels²."""
    line = mass.sum(tuple(other for other in range(3) if other != axis))
    index, line = np.arange(len(line)), line / line.sum()
    return float((line * (index - (line * index).sum()) ** 2).sum())


def in_hu(values: np.ndarray) -> np.ndarray:
    """Of a window from -1000 to 1000."""
    return values.astype(float) / PER_HU


def _clean(contestant: Contestant, patch: Tensor, seed: int) -> np.ndarray:
    contestant.seed(seed)
    clean, _ = contestant(patch.to(contestant.device))
    return clean[:, 0].cpu().numpy()


def _pairs(make: Make, degradation: str, patch: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Views (x, y, z) in the network's range, as they are and degraded in one way."""
    contestant = make((degradation,))
    for seed in SEEDS:
        contestant.seed(seed)
        for pair in zip(*contestant(patch.to(contestant.device)), strict=True):
            clean, degraded = (view[0].cpu().numpy() for view in pair)
            yield clean, degraded


def _assert(holds: object, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
