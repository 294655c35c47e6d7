"""Two degraded, overlapping views of every patch of a batch, and the exact mapping of their voxels to the patch.

All randomness comes from the draws given, on their device, patch by patch; nothing waits for it. Call outside autocast,
as intensities need float32; geometry is float64, since TF32, where a run allows it, would move voxels.

Legend: B patches, V = 2·B views (row b is the first, row B + b the second view of patch b), (X, Y, Z) patch size,
(x, y, z) view size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mixcl_dist.constants import constant
from mixcl_dist.intensity import rescale
from mixcl_dist.pretraining.draws import Draws
from mixcl_dist.settings import ViewsConfig

MASKED_VALUE = -1.0  # air: no tissue inside a body looks like a cube of it, and outside there is nothing to restore
IDENTITY = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
CROSS_PRODUCT = (
    (0, 0, 0, 0, 0, -1, 0, 1, 0),
    (0, 0, 1, 0, 0, 0, -1, 0, 0),
    (0, -1, 0, 1, 0, 0, 0, 0, 0),
)
"""Row a is the matrix, row by row, that crosses axis a with what follows."""


@dataclass(frozen=True)
class Views:
    """What the network sees, what it should restore, and where that lies in the patch."""

    image: torch.Tensor
    """(V, 1, x, y, z) float32 in [-1, 1]: degraded, `MASKED_VALUE` in masked blocks."""
    clean: torch.Tensor
    """(V, 1, x, y, z) float32 in [-1, 1]: the same crop before degradation."""
    mask: torch.Tensor
    """(V, 1, x, y, z) bool: true in masked blocks."""
    patch_from_view: torch.Tensor
    """(V, 4, 4) float32: view voxel index → continuous voxel index of the patch."""


@torch.no_grad()
def make_views(
    image: torch.Tensor,
    spacing: torch.Tensor,
    config: ViewsConfig,
    window_hu: tuple[float, float],
    draws: Draws,
) -> Views:
    """Cut two views from each patch and degrade them.

    `image` is (B, 1, X, Y, Z) in HU, `spacing` (B, 3) in mm; both on the draws' device. Raises `ValueError`
    where a view is larger than the patch. Views are not flipped, since anatomical classes have sides.
    """
    patch_size = tuple(image.shape[2:])
    if any(edge > patch for edge, patch in zip(config.size, patch_size, strict=True)):
        raise ValueError(f"views.size {config.size} exceeds the patch size {patch_size}; choose a smaller view")
    patch_from_view = _draw_geometry(patch_size, spacing, config, draws)
    sharp = _resample(rescale(image, window_hu), patch_from_view, config.size)
    mask = _draw_mask(config, draws)
    hu = 2 / (window_hu[1] - window_hu[0])  # in the network's range
    degraded = _degrade(sharp, hu, config, draws).clamp_(-1, 1).masked_fill_(mask, MASKED_VALUE)
    return Views(degraded, sharp.clamp_(-1, 1), mask, patch_from_view.float())


def _draw_geometry(
    patch_size: tuple[int, ...], spacing: torch.Tensor, config: ViewsConfig, draws: Draws
) -> torch.Tensor:
    """(V, 4, 4) float64: turn and scale about the view's centre in mm, then move to the view's place in the patch."""
    spacing = spacing.double()
    largest = math.radians(config.rotation_deg)
    scale, angle = _between([config.scale, (-largest, largest)], draws, torch.float64).view(2, -1, 2, 1).unbind(2)
    # S⁻¹ R S: a rotation in mm, written in voxels
    turn = _draw_rotations(angle, draws)
    linear = (scale[..., None] * turn * (spacing[:, None, :] / spacing[:, :, None])).flatten(0, 1)
    centre = constant(_middle(config.size), torch.float64, spacing.device)[:, None]
    place = _draw_origins(patch_size, scale, config, draws).view(-1, 3, 1) + centre
    shift = torch.baddbmm(place, linear, centre.expand(len(linear), 3, 1), alpha=-1)
    last_row = constant(((0, 0, 0, 1),), torch.float64, spacing.device)
    return torch.cat([torch.cat([linear, shift], dim=2), last_row.expand(len(linear), 1, 4)], dim=1)


def _draw_rotations(angle: torch.Tensor, draws: Draws) -> torch.Tensor:
    """(2, B, 3, 3) float64: turns by `angle` (2, B, 1) about a uniformly random axis (Rodrigues' formula)."""
    axis = draws.normal(3, parts=2, dtype=torch.float64)
    axis = axis / axis.norm(dim=1, keepdim=True)
    cross = (axis @ constant(CROSS_PRODUCT, axis.dtype, axis.device)).view(2, -1, 3, 3)
    angle = angle[..., None]
    turn = torch.addcmul(constant(IDENTITY, axis.dtype, axis.device), angle.sin(), cross)
    return turn.addcmul_(1 - angle.cos(), cross @ cross)


def _draw_origins(patch_size: tuple[int, ...], scale: torch.Tensor, config: ViewsConfig, draws: Draws) -> torch.Tensor:
    """(2, B, 3) float64 whole voxels: first corner of each view before it is turned and scaled about its centre.

    Scaled boxes lie inside the patch where they fit, else in its middle; two boxes share at least `min_overlap`.
    """
    room = tuple(patch - edge for patch, edge in zip(patch_size, config.size, strict=True))
    bounds = config.size, _middle(config.size), room, tuple(edge // 2 for edge in room), (0, 0, 0)
    size, half, room, middle, zero = constant(bounds, scale.dtype, scale.device)
    growth = (scale.amax(0) - 1) * half  # the larger scale bounds both boxes
    low = growth.ceil().clamp(zero, middle)
    end = room - low + 1
    share, first, second = draws.uniform(3, 3, dtype=scale.dtype).unbind(1)
    # Overlap by volume is a product over axes: its logarithm is shared out among them at random.
    share = share.log()
    reach = ((1 - config.min_overlap ** (share / share.sum(1, keepdim=True))) * size).floor()
    first = low.lerp(end, first).floor()
    second = low.maximum(first - reach).lerp(end.minimum(first + reach + 1), second).floor()
    return torch.stack([first, second])


def _resample(image: torch.Tensor, patch_from_view: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """(V, 1, x, y, z) trilinear values of (B, 1, X, Y, Z) at the views' voxels; beyond the patch its border voxel is
    repeated."""
    # `grid_sample` counts axes backwards and runs from -1 to 1 between the first and last voxel's centres. Its grid is
    # a sum, not a matrix product: that could be rounded to TF32.
    x, y, z = (2 / max(edge - 1, 1) for edge in image.shape[2:])
    backwards = constant(((0, 0, z, -1), (0, y, 0, -1), (x, 0, 0, -1)), torch.float64, image.device)
    affine = backwards.expand(len(patch_from_view), 3, 4).bmm(patch_from_view).view(2, -1, 1, 1, 1, 3, 4)
    pairs = affine.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    *columns, grid = pairs.unbind(-1)
    for axis, (edge, column) in enumerate(zip(size, columns, strict=True)):
        index = constant(tuple(range(edge)), torch.float32, image.device)
        grid = torch.addcmul(grid, column, index.view([-1 if a == axis else 1 for a in range(4)]))
    sampled = F.grid_sample(image, grid.flatten(1, 2), mode="bilinear", padding_mode="border", align_corners=True)
    return sampled.view(-1, 2, *size).transpose(0, 1).reshape(-1, 1, *size)


def _draw_mask(config: ViewsConfig, draws: Draws) -> torch.Tensor:
    """(V, 1, x, y, z) bool: the same number of blocks in every view, `mask_fraction` of them."""
    blocks = [-(-edge // config.mask_block) for edge in config.size]
    lots = draws.uniform(math.prod(blocks), parts=2)
    chosen = lots.topk(round(config.mask_fraction * lots.shape[1]), dim=1).indices
    mask = torch.zeros_like(lots, dtype=torch.bool).scatter_(1, chosen, True)
    x, y, z = blocks
    edge = config.mask_block
    voxels = mask.view(-1, 1, x, 1, y, 1, z, 1).expand(-1, -1, -1, edge, -1, edge, -1, edge)
    width, height, depth = config.size
    return voxels.reshape(-1, 1, x * edge, y * edge, z * edge)[..., :width, :height, :depth]


def _degrade(image: torch.Tensor, hu: float, config: ViewsConfig, draws: Draws) -> torch.Tensor:
    """Blur and coarsen each axis of each view differently (as slice thickness does), then add noise and a shift.

    `hu` is the size of one HU in the image's units.
    """
    ranges = [
        *[(0.0, config.blur_sigma)] * 3,
        *[(1.0, config.low_resolution)] * 3,
        (0.0, config.noise_hu * hu),
        (-config.shift_hu * hu, config.shift_hu * hu),
    ]
    sigma, factor, deviation, shift = _between(ranges, draws, torch.float32).split([3, 3, 1, 1], dim=1)
    noise = draws.normal(*image.shape[1:], parts=2)
    for kernel in _smoothings(config.size, sigma, factor):  # the first axis becomes the last, three times
        image = image.view(len(kernel), len(kernel[0]), -1).mT @ kernel.mT
    return torch.addcmul(image.view_as(noise), noise, _per_view(deviation)).add_(_per_view(shift))


def _smoothings(size: tuple[int, ...], sigma: torch.Tensor, factor: torch.Tensor) -> Sequence[torch.Tensor]:
    """`_smoothing` along each axis by its column of (V, 3), all at once where edges are equal."""
    if len(set(size)) == 1:
        return _smoothing(size[0], sigma, factor).unbind(1)
    return [_smoothing(edge, sigma[:, axis], factor[:, axis]) for axis, edge in enumerate(size)]


def _smoothing(edge: int, sigma: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """(…, edge, edge) float32, rows summing to 1: along one axis blur by `sigma` voxels, keep every `factor`-th
    position and interpolate back; `sigma` 0 and `factor` 1 give the identity. `sigma` and `factor` are (…)."""
    index = constant(tuple(range(edge)), torch.float32, sigma.device)
    blur = (_log_gaussian(edge, sigma.device) / sigma.clamp(min=1e-3).square()[..., None, None]).softmax(-1)
    position = torch.stack([factor, 1 / factor])[..., None, None] * index[:, None]
    coarsen, refine = F.relu(1 - (position - index).abs())  # what a position takes from the two beside it
    keep = refine @ coarsen
    return (keep / keep.sum(-1, keepdim=True)) @ blur


@functools.lru_cache(maxsize=8)
def _log_gaussian(edge: int, device: torch.device) -> torch.Tensor:
    """(edge, edge) float32, of deviation 1 and not normalised."""
    index = torch.arange(edge, dtype=torch.float32, device=device)
    return -(index[:, None] - index).square() / 2


def _between(ranges: Sequence[tuple[float, float]], draws: Draws, dtype: torch.dtype) -> torch.Tensor:
    """(V, len(ranges)) uniform numbers, one of each range for each view."""
    low, high = constant(tuple(zip(*ranges, strict=True)), dtype, draws.device)
    return low.lerp(high, draws.uniform(len(ranges), parts=2, dtype=dtype))


def _middle(size: tuple[int, ...]) -> tuple[float, ...]:
    """The index between the first and last voxel."""
    return tuple((edge - 1) / 2 for edge in size)


def _per_view(value: torch.Tensor) -> torch.Tensor:
    """(V, 1), to go with images of each view."""
    return value.view(-1, 1, 1, 1, 1)
