"""Which voxels of two views become rows of the contrastive loss, with their identities and candidate sets.

Legend: B patches, V = 2·B views (row b is the first, row B + b the second view of patch b), C classes, K cells of a
patch, P points drawn, R = 2·P rows, S different candidate sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixcl_dist.config import RowsConfig
from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.draws import Draws


@dataclass(frozen=True)
class Rows:
    """Voxels of the views: the first P rows lie in first views, the last P are their twins in second views."""

    voxel_index: torch.Tensor
    """(R, 4) int64: view, x, y, z."""
    identity: torch.Tensor
    """(R,) int64: number of the point that a row shows; each is shown twice."""
    candidate_set: torch.Tensor
    """(R,) int64: index into `set_table`."""
    set_table: torch.Tensor
    """(S, C + 2) bool: the classes that a row may belong to; the last two stand for "no class of the catalogue"."""
    group: torch.Tensor | None = None


@torch.no_grad()
def sample_rows(
    patch_from_view: torch.Tensor,
    view_size: tuple[int, int, int],
    label: torch.Tensor,
    candidate_bits: torch.Tensor,
    config: RowsConfig,
    draws: Draws,
) -> Rows:
    """Draw up to `config.per_view_pair` points a patch where both views see it, and say what each may be.

    `patch_from_view` is (V, 4, 4), `label` (B, X, Y, Z) uint8, `candidate_bits` (B, C + 2) int64 with one bit for each
    of C + 2 classes: a column for each label and the last for ignored voxels; all on the draws' device. Fewer rows come
    out where the overlap holds fewer points.
    """
    patch_from_view = patch_from_view.double()
    point, patch = _draw_points(torch.linalg.inv(patch_from_view), view_size, label, config, draws)
    view = torch.cat([patch, patch + len(label)])
    voxel = _apply(torch.linalg.inv(patch_from_view)[view], point.repeat(2, 1)).round()
    # A row may be what the label says at its own voxel's centre, or at its twin's: they differ at borders.
    seen = _apply(patch_from_view[view], voxel).round().long()
    x, y, z = seen.clamp(min=seen.new_zeros(3), max=seen.new_tensor(label.shape[1:]) - 1).unbind(1)
    found = label[patch.repeat(2), x, y, z].long().clamp(max=candidate_bits.shape[1] - 1)  # 255 is ignored
    first, second = candidate_bits[patch.repeat(2), found].chunk(2)
    sets, candidate_set = torch.unique(first | second, return_inverse=True)
    # A catalogue of more classes than bits comes without labels: every set is then all ones.
    bit = torch.arange(min(candidate_bits.shape[1], 63), device=sets.device)
    return Rows(
        voxel_index=torch.cat([view[:, None], voxel.long()], dim=1),
        identity=torch.arange(len(point), device=sets.device).repeat(2),
        candidate_set=candidate_set.repeat(2),
        set_table=(sets[:, None] >> bit & 1).bool(),
    )


def _draw_points(
    view_from_patch: torch.Tensor,
    view_size: tuple[int, int, int],
    label: torch.Tensor,
    config: RowsConfig,
    draws: Draws,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (P, 3) float64, voxel centres of their patches, and the patch (P,) of each; no two of one cell."""
    wanted = round(config.border_fraction * config.per_view_pair)
    anywhere, border, has_border = _cell_points(label, config.min_spacing, draws)
    seen = _in_both_views(view_from_patch, view_size, border) & has_border
    weight = _class_balance(label, border, seen)
    border_cell, chosen = _draw(weight, wanted, draws)
    border_point = _pick(border, border_cell)

    free = _in_both_views(view_from_patch, view_size, anywhere) & _inside(anywhere, label.shape[1:])
    free &= ~torch.zeros_like(seen).scatter(1, border_cell, chosen)
    cell, also_chosen = _draw(free.double(), config.per_view_pair, draws)
    left = config.per_view_pair - chosen.sum(dim=1, keepdim=True)
    also_chosen &= torch.arange(cell.shape[1], device=cell.device) < left

    point = torch.cat([border_point, _pick(anywhere, cell)], dim=1)
    drawn = torch.cat([chosen, also_chosen], dim=1)
    return point[drawn], drawn.nonzero()[:, 0]


def _cell_points(
    label: torch.Tensor, min_spacing: int, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random voxel of each cell (B, K, 3), a random one near a border (B, K, 3), whether the cell has one (B, K).

    Cells have an edge of 2·min_spacing − 1 voxels and give points from a cube of `min_spacing` voxels in their
    corner, so points of different cells are at least `min_spacing` apart along some axis. The grid of cells starts
    at a random voxel. Points may lie outside the patch.
    """
    edge = 2 * min_spacing - 1
    device = label.device
    phase = (edge * draws.uniform(1, 3)).long()
    corner = edge * _lattice([size // edge + 2 for size in label.shape[1:]], device) - phase
    cube = _lattice([min_spacing] * 3, device)
    voxel = corner[:, :, None] + cube
    noise = draws.uniform(*voxel.shape[1:3], dtype=torch.float32)
    near = _lookup(_near_border(label), voxel) & _inside(voxel, label.shape[1:])
    anywhere = corner + cube[noise.argmax(dim=2)]
    border = corner + cube[(noise * near).argmax(dim=2)]
    return anywhere.double(), border.double(), near.any(dim=2)


def _near_border(label: torch.Tensor) -> torch.Tensor:
    """(B, X, Y, Z) bool: voxels whose 3 × 3 × 3 neighbourhood holds more than one label."""
    low = high = label
    for axis in (
        1,
        2,
        3,
    ):  # bytes, an axis at a time: many times faster than pooling, which takes floats only
        index = torch.arange(label.shape[axis], device=label.device)
        before, after = (index - 1).clamp(min=0), (index + 1).clamp(max=len(index) - 1)
        low = low.minimum(low.index_select(axis, before)).minimum(low.index_select(axis, after))
        high = high.maximum(high.index_select(axis, before)).maximum(high.index_select(axis, after))
    return low != high


def _class_balance(label: torch.Tensor, point: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """(B, K) float64 weights of usable points that give every label of a patch the same total; 0 for the others, and
    for ignored voxels."""
    value = _lookup(label, point.long()).long()
    usable = usable & (value != IGNORED)
    count = torch.zeros(len(label), 256, device=label.device, dtype=torch.float64)
    count.scatter_add_(1, value, usable.double())
    return usable / count.gather(1, value).clamp(min=1)


def _draw(weight: torch.Tensor, count: int, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to `count` columns of each row, drawn without replacement in proportion to `weight` (B, K).

    Returns (B, count) columns and which of them count: fewer where fewer weights are positive.
    """
    # The smallest of exponential waiting times, each with its own rate: weighted drawing without replacement.
    waiting = draws.exponential(weight.shape[1]) / weight
    time, column = waiting.topk(min(count, weight.shape[1]), dim=1, largest=False)
    return column, time.isfinite()


def _pick(point: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
    return point.gather(1, cell[..., None].expand(-1, -1, 3))


def _in_both_views(view_from_patch: torch.Tensor, view_size: tuple[int, int, int], point: torch.Tensor) -> torch.Tensor:
    """(B, K) bool: the voxel nearest to a point (B, K, 3) exists in both views of its patch."""
    first, second = (_inside(_apply(matrix[:, None], point).round(), view_size) for matrix in view_from_patch.chunk(2))
    return first & second


def _apply(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Affine maps (…, 4, 4) of voxel indices (…, 3)."""
    return (matrix[..., :3, :3] * index[..., None, :]).sum(-1) + matrix[..., :3, 3]


def _inside(voxel: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    return ((voxel >= 0) & (voxel < voxel.new_tensor(size))).all(dim=-1)


def _lookup(volume: torch.Tensor, voxel: torch.Tensor) -> torch.Tensor:
    """Values of (B, X, Y, Z) at (B, …, 3) int64; voxels outside take the nearest one inside."""
    x, y, z = (voxel[..., a].clamp(0, volume.shape[a + 1] - 1) for a in range(3))
    flat = (x * volume.shape[2] + y) * volume.shape[3] + z
    return volume.flatten(1).gather(1, flat.flatten(1)).view(flat.shape)


def _lattice(shape: list[int], device: torch.device) -> torch.Tensor:
    """(∏ shape, 3) int64: every voxel index of a box."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in shape)).view(-1, 3)
