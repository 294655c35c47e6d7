"""Two degraded, overlapping views of every patch of a batch, and the exact mapping of their voxels to the patch.

All randomness comes from the draws given, on their device, patch by patch. Call outside autocast, as intensities need
float32.

Legend: B patches, V = 2·B views (row b is the first, row B + b the second view of patch b), (X, Y, Z) patch size,
(x, y, z) view size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mixcl_dist.config import ViewsConfig
from mixcl_dist.draws import Draws
from mixcl_dist.intensity import normalise

MASKED_VALUE = -1.0  # air: no tissue inside a body looks like a cube of it, and outside there is nothing to restore


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
    hu = _resample(image.float().repeat(2, 1, 1, 1, 1), patch_from_view, config.size)
    mask = _draw_mask(config, draws)
    degraded = normalise(_degrade(hu, config, draws), window_hu).masked_fill(mask, MASKED_VALUE)
    return Views(degraded, normalise(hu, window_hu), mask, patch_from_view.float())


def _draw_geometry(
    patch_size: tuple[int, ...], spacing: torch.Tensor, config: ViewsConfig, draws: Draws
) -> torch.Tensor:
    """(V, 4, 4) float64: turn and scale about the view's centre in mm, then move to the view's place in the patch."""
    spacing = spacing.double().repeat(2, 1)
    size = spacing.new_tensor(config.size)
    low, high = config.scale
    scale = low + (high - low) * _of_views(draws.uniform(2, 1))
    # S⁻¹ R S: a rotation in mm, written in voxels
    turn = _draw_rotations(config.rotation_deg, draws)
    linear = scale[..., None] * turn * spacing[:, None, :] / spacing[:, :, None]
    centre = (size - 1) / 2
    matrix = torch.eye(4, dtype=torch.float64, device=spacing.device).repeat(len(spacing), 1, 1)
    matrix[:, :3, :3] = linear
    matrix[:, :3, 3] = _draw_origins(patch_size, scale, config, draws) + centre - linear @ centre
    return matrix


def _draw_rotations(largest_deg: float, draws: Draws) -> torch.Tensor:
    """(V, 3, 3) float64: turns about a uniformly random axis (Rodrigues' formula)."""
    axis = F.normalize(_of_views(draws.normal(2, 3)), dim=1)
    angle = torch.deg2rad(largest_deg * (2 * _of_views(draws.uniform(2, 1, 1)) - 1))
    identity = torch.eye(3, dtype=axis.dtype, device=axis.device)
    cross = torch.linalg.cross(axis[:, None, :], identity[None], dim=-1).mT
    return identity + angle.sin() * cross + (1 - angle.cos()) * cross @ cross


def _draw_origins(patch_size: tuple[int, ...], scale: torch.Tensor, config: ViewsConfig, draws: Draws) -> torch.Tensor:
    """(V, 3) float64 whole voxels: first corner of each view before it is turned and scaled about its centre.

    Scaled boxes lie inside the patch where they fit, else in its middle; two boxes share at least `min_overlap`.
    """
    pairs = len(scale) // 2
    size = scale.new_tensor(config.size)
    room = scale.new_tensor(patch_size) - size
    growth = (scale.view(2, pairs, 1).amax(0) - 1).clamp(min=0) * (size - 1) / 2  # the larger scale bounds both boxes
    low, high = growth.ceil(), (room - growth).floor()
    fits, middle = low <= high, (room / 2).floor()
    low, high = torch.where(fits, low, middle), torch.where(fits, high, middle)
    # Overlap by volume is a product over axes: its logarithm is shared out among them at random.
    share = F.normalize(draws.exponential(3), p=1, dim=1)
    reach = ((1 - config.min_overlap**share) * size).floor()
    first = draws.whole(low, high)
    second = draws.whole(torch.maximum(low, first - reach), torch.minimum(high, first + reach))
    return torch.cat([first, second])


def _resample(image: torch.Tensor, patch_from_view: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Trilinear values of (V, 1, X, Y, Z) at the views' voxels; beyond the patch its border voxel is repeated."""
    # `grid_sample` counts axes backwards and runs from -1 to 1 between the first and last voxel's centres.
    half_patch, half_view = (
        (patch_from_view.new_tensor(shape).flip(0) - 1).clamp(min=1) / 2 for shape in (image.shape[2:], size)
    )
    linear = patch_from_view[:, :3, :3].flip(1, 2)
    centre = linear @ half_view + patch_from_view[:, :3, 3].flip(1)
    theta = torch.cat([linear * half_view / half_patch[:, None], (centre / half_patch - 1)[..., None]], dim=2)
    grid = F.affine_grid(theta.float(), [len(image), 1, *size], align_corners=True)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _draw_mask(config: ViewsConfig, draws: Draws) -> torch.Tensor:
    """(V, 1, x, y, z) bool: the same number of blocks in every view, `mask_fraction` of them."""
    blocks = [-(-edge // config.mask_block) for edge in config.size]
    total = blocks[0] * blocks[1] * blocks[2]
    rank = _of_views(draws.uniform(2, total)).argsort(dim=1).argsort(dim=1)
    mask = (rank < round(config.mask_fraction * total)).view(len(rank), 1, *blocks)
    for axis, edge in enumerate(config.size, start=2):
        mask = mask.repeat_interleave(config.mask_block, dim=axis).narrow(axis, 0, edge)
    return mask


def _degrade(hu: torch.Tensor, config: ViewsConfig, draws: Draws) -> torch.Tensor:
    """Blur and coarsen each axis of each view differently (as slice thickness does), then add noise and a shift."""
    sigma = config.blur_sigma * _of_views(draws.uniform(2, 3)).float()
    factor = 1 + (config.low_resolution - 1) * _of_views(draws.uniform(2, 3)).float()
    smooth = (_smoothing(edge, sigma[:, a], factor[:, a]) for a, edge in enumerate(config.size))
    hu = torch.einsum("vcijk,vxi,vyj,vzk->vcxyz", hu, *smooth)
    deviation, shift = _of_views(draws.uniform(2, 2, 1, 1, 1, 1)).float().unbind(1)
    noise = _of_views(draws.normal(2, *hu.shape[1:], dtype=torch.float32))
    return hu + noise * (config.noise_hu * deviation) + config.shift_hu * (2 * shift - 1)


def _smoothing(edge: int, sigma: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """(V, edge, edge) float32, rows summing to 1: along one axis blur by `sigma` voxels, keep every `factor`-th
    position and interpolate back; `sigma` 0 and `factor` 1 give the identity."""
    index = torch.arange(edge, dtype=torch.float32, device=sigma.device)
    sigma, factor = sigma.clamp(min=1e-3)[:, None, None], factor[:, None, None]
    distance = index[:, None] - index
    blur = torch.exp(-0.5 * (distance / sigma) ** 2)
    coarsen = F.relu(1 - (index[:, None] * factor - index).abs())
    refine = F.relu(1 - (index[:, None] / factor - index).abs())
    keep = refine @ coarsen
    return (keep / keep.sum(2, keepdim=True)) @ (blur / blur.sum(2, keepdim=True))


def _of_views(drawn: torch.Tensor) -> torch.Tensor:
    """(B, 2, …), two for each patch, in the order of views: (V, …)."""
    return drawn.transpose(0, 1).flatten(0, 1)
