"""Which voxels of two views become rows of the contrastive loss, with their identities and candidate sets.

Nothing here waits for the device that holds the tensors: how many rows there are follows from sizes alone, and a mask
says which of them the overlap of the views could fill.

Legend: B patches, V = 2·B views (row b is the first, row B + b the second view of patch b), C classes, K cells of a
patch, P points drawn in each patch, R = 2·B·P rows, S candidate sets, W words of a set's bit mask.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch.nn import functional as F

from mixcl_dist.constants import constant, lattice
from mixcl_dist.data_shards.catalogue import IGNORED, WORD_BITS
from mixcl_dist.pretraining.draws import Draws
from mixcl_dist.settings import RowsConfig

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_SETS = 1024
"""Most different candidate sets of a batch: the loss makes a table of any two of them."""
EVERY_CLASS = -1
"""As a word of a bit mask."""


@dataclass(frozen=True)
class Rows:
    """Voxels of the views: the first B·P rows lie in first views, the last B·P are their twins in second views."""

    voxel_index: torch.Tensor
    """(R, 4) int64: view, x, y, z; valid also where a row is not present."""
    identity: torch.Tensor
    """(R,) int64: number of the point that a row shows; each is shown twice, and by one process alone."""
    candidate_set: torch.Tensor
    """(R,) int64: index into `set_table`."""
    set_table: torch.Tensor
    """(S, C + 2) bool: the classes that a row may belong to; the last two stand for "no class of the catalogue"."""
    present: torch.Tensor
    """(R,) bool: false where the overlap holds no further point; such a row takes no part in the loss."""


@torch.no_grad()
def sample_rows(
    patch_from_view: torch.Tensor,
    view_size: tuple[int, int, int],
    label: torch.Tensor,
    candidate_bits: torch.Tensor,
    config: RowsConfig,
    draws: Draws,
    process_group: ProcessGroup | None = None,
) -> Rows:
    """Draw `config.per_view_pair` points a patch where both views see it, and say what each may be.

    `patch_from_view` is (V, 4, 4), `label` (B, X, Y, Z) uint8, `candidate_bits` (B, C + 2, W) int64 with one bit for
    each of C + 2 classes (`Catalogue.candidate_bits`): a column for each label and the last for ignored voxels; all on
    the draws' device. There are P = `config.per_view_pair` rows of each view, or one for each cell where that is less
    (see `_cells`). Of more than `MAX_SETS` candidate sets in one batch, the rows of those with the highest bits are not
    present. The batch is that of all processes of `process_group`: they agree on one table of sets, and number their
    points apart.
    """
    patch_from_view = patch_from_view.double()
    voxel, present = _draw_points(patch_from_view, view_size, label, config, draws)
    sets = _union_of_labels(patch_from_view, voxel, label, candidate_bits).flatten(0, 1)
    everyone, own = _gathered(sets, process_group)
    patches = len(label) * (len(everyone) // len(sets))
    capacity = _most_sets(patches, candidate_bits.shape[1], len(everyone))
    candidate_set, table, fits = _number_sets(everyone, capacity)
    places = [divmod(bit, WORD_BITS) for bit in range(candidate_bits.shape[1])]
    words, bits = zip(*((word, 1 << bit) for word, bit in places), strict=True)
    word_of_class, bit_of_class = constant((words, bits), torch.int64, sets.device)
    view, identity = _row_numbers(*present.shape, sets.device)
    return Rows(
        voxel_index=torch.cat([view, voxel.long().flatten(0, 1)], dim=1),
        identity=identity + own.start,
        candidate_set=candidate_set[own].repeat(2),
        set_table=(table.index_select(1, word_of_class) & bit_of_class).bool(),
        present=(present.flatten() & fits[own]).repeat(2),
    )


def _draw_points(
    patch_from_view: torch.Tensor,
    view_size: tuple[int, int, int],
    label: torch.Tensor,
    config: RowsConfig,
    draws: Draws,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(V, P, 3) float64 voxels that show P points of each patch, no two of one cell, and which are there (B, P)."""
    point, border_label = _cell_points(label, config.min_spacing, draws)
    alike = config.min_spacing == 1  # a cell is one voxel, so its two points are one
    point = point[:, :1] if alike else point
    voxel, seen = _in_both_views(patch_from_view, view_size, label.shape[1:], point.flatten(1, 2))
    seen = seen.view(len(label), point.shape[1], -1)
    score = _scores(border_label, seen.repeat(1, 2, 1) if alike else seen, draws)
    wanted = round(config.border_fraction * config.per_view_pair)
    chosen, present = _choose(score, wanted, min(config.per_view_pair, score.shape[2]))
    chosen = chosen % score.shape[2] if alike else chosen
    return voxel.gather(2, chosen[None, ..., None].expand(2, -1, -1, 3)).flatten(0, 1), present


def _cell_points(label: torch.Tensor, min_spacing: int, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Two points of each cell, (B, 2, K, 3) int64: a random voxel near a border, and a random one anywhere.

    Also the label of the first, (B, K) int64, `IGNORED` where a cell has none. Points anywhere may lie outside the
    patch. The grid of cells starts at a random voxel.
    """
    cells = _cells(tuple(label.shape[1:]), min_spacing, label.device)
    phase = (draws.uniform(3) * cells.edge).long()
    labels = F.pad(_border_labels(label), cells.padding, value=IGNORED).flatten(1)
    labels = labels.gather(1, cells.place - (phase * cells.stride).sum(1, keepdim=True))
    labels = labels.view(len(label), len(cells.corner), len(cells.cube))
    lots = draws.uniform(*labels.shape[1:])
    refused = constant(((IGNORED,), (-1,)), torch.int16, label.device)[..., None]  # near a border, and anywhere
    pick = (lots[:, None] * (labels[:, None] != refused)).argmax(3)
    point = (cells.corner - phase[:, None])[:, None] + cells.cube[pick]
    return point, labels.gather(2, pick[:, 0, :, None])[..., 0].long()


class _Cells(NamedTuple):
    """A grid over a patch. Cells have an edge of 2·min_spacing − 1 voxels and give points from a cube of `min_spacing`
    voxels in their corner, so points of different cells are at least `min_spacing` apart along some axis."""

    edge: int
    corner: torch.Tensor  #: (K, 3) int64, as all below
    cube: torch.Tensor  #: (min_spacing³, 3)
    padding: tuple[int, ...]  #: of a patch, as `pad` takes it, so that every cell lies inside, up to `edge` − 1 lower
    stride: torch.Tensor  #: (3,), of the padded patch
    place: torch.Tensor  #: (K · min_spacing³,), of the cubes' voxels in the padded patch


@functools.lru_cache(maxsize=8)
def _cells(shape: tuple[int, int, int], min_spacing: int, device: torch.device) -> _Cells:
    edge = 2 * min_spacing - 1
    corner = edge * lattice(tuple(size // edge + 2 for size in shape), device)
    cube = lattice((min_spacing,) * 3, device)
    after = [edge * (size // edge + 1) + min_spacing - size for size in shape]
    _, height, depth = (edge - 1 + size + more for size, more in zip(shape, after, strict=True))
    stride = constant((height * depth, depth, 1), torch.int64, device)
    place = ((corner[:, None] + cube + edge - 1) * stride).sum(2).flatten()
    return _Cells(edge, corner, cube, tuple(n for more in reversed(after) for n in (edge - 1, more)), stride, place)


def _border_labels(label: torch.Tensor) -> torch.Tensor:
    """(B, X, Y, Z) uint8: labels of voxels whose 3 × 3 × 3 neighbourhood holds more than one, `IGNORED` elsewhere."""
    # Largest label and largest complement around: bytes, an axis at a time, are many times faster than pooling, which
    # takes floats only.
    extremes = F.pad(label ^ constant((0, 255), torch.uint8, label.device).view(2, 1, 1, 1, 1), (1,) * 6)
    for axis, edge in enumerate(label.shape[1:], start=2):
        before, here, after = (extremes.narrow(axis, start, edge) for start in range(3))
        extremes = before.maximum(here).maximum(after)
    return label.masked_fill(extremes[0] ^ extremes[1] == 255, IGNORED)


def _in_both_views(
    patch_from_view: torch.Tensor, view_size: tuple[int, ...], patch_size: tuple[int, ...], point: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest voxels (2, B, N, 3) float64 of points (B, N, 3) in the first and in the second view, moved inside.

    Also (B, N) bool: the point lies in the patch, and those voxels were inside.
    """
    # The patch is treated as a third view, of itself.
    itself = constant(((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)), torch.float64, point.device)
    maps = torch.cat([patch_from_view.unflatten(0, (2, -1)), itself.expand(1, len(point), 4, 4)])
    voxel = ((point - maps[..., None, :3, 3]) @ _transposed_inverse(maps[..., :3, :3])).round()
    inside = _move_inside(voxel, (view_size, view_size, patch_size))
    return inside[:2], (inside == voxel).all(dim=(0, 3))


def _transposed_inverse(matrix: torch.Tensor) -> torch.Tensor:
    """Of (…, 3, 3), by cofactors: a batched factorisation takes many launches."""
    cofactor = torch.linalg.cross(matrix.roll(-1, -2), matrix.roll(-2, -2))
    return cofactor / (matrix[..., :1, :] * cofactor[..., :1, :]).sum(-1, keepdim=True)


def _scores(border_label: torch.Tensor, seen: torch.Tensor, draws: Draws) -> torch.Tensor:
    """(B, 2, K) float32 < 0: the points with the largest ones are to be drawn; −inf where a cell has none.

    Points near borders get weights that give every label of a patch the same total, all others the same weight: the
    largest log(u) / weight draw without replacement in proportion to it (Efraimidis and Spirakis 2006).
    """
    seen[:, 0].logical_and_(border_label != IGNORED)
    score = draws.uniform(2, seen.shape[2]).log_()
    count = score.new_zeros(len(seen), IGNORED + 1).scatter_add_(1, border_label, seen[:, 0].float())
    score[:, 0].mul_(count.gather(1, border_label))
    return score.masked_fill_(seen.logical_not(), -torch.inf)


def _choose(score: torch.Tensor, border: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, count) columns of (B, 2 · K) points, no two of one cell, and which of them count.

    First the best points near borders, `border` of them or as many as there are, then the best anywhere.
    """
    near_border, anywhere = score.unbind(1)
    first_left_out = near_border.topk(min(border, score.shape[2] - 1) + 1).values[:, -1:]
    drawn = near_border > first_left_out
    # The logarithm of true is 0, above every score.
    best = torch.cat([drawn.log(), anywhere.masked_fill(drawn, -torch.inf)], dim=1).topk(count)
    return best.indices, best.values > -torch.inf


def _union_of_labels(
    patch_from_view: torch.Tensor, voxel: torch.Tensor, label: torch.Tensor, candidate_bits: torch.Tensor
) -> torch.Tensor:
    """(B, P, W) int64: what a point may be, by the label at the centre of its voxel (V, P, 3) in the one or the other
    view: they differ at borders."""
    shape = label.shape[1:]
    seen = torch.baddbmm(patch_from_view[:, None, :3, 3], voxel, patch_from_view[:, :3, :3].mT).round()
    stride = constant((shape[1] * shape[2], shape[2], 1), seen.dtype, seen.device)
    place = (_move_inside(seen, (shape,)) @ stride).long().view(2, len(label), -1)
    found = label.flatten(1).expand(2, -1, -1).gather(2, place).long()
    found = found.clamp_(max=candidate_bits.shape[1] - 1)  # 255 is ignored
    words = candidate_bits.shape[2]
    first, second = candidate_bits.expand(2, -1, -1, -1).gather(2, found[..., None].expand(-1, -1, -1, words))
    return first | second


def _gathered(sets: torch.Tensor, process_group: ProcessGroup | None) -> tuple[torch.Tensor, slice]:
    """Bit masks (N, W) of all processes, in the order of ranks, from this process's own, and where these are."""
    if process_group is None:
        return sets, slice(0, len(sets))
    parts = [torch.empty_like(sets) for _ in range(process_group.size())]
    dist.all_gather(parts, sets, group=process_group)
    first = process_group.rank() * len(sets)
    return torch.cat(parts), slice(first, first + len(sets))


def _number_sets(sets: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers (N,) of bit masks (N, W), equal where those are, the table (capacity, W) of masks by number, and which
    masks (N,) are in it. A number that no mask has stands for every class, the last one for those that are not."""
    first, *others = sets.unbind(1)
    order = first.argsort(stable=True)
    for word in others:  # the last one counts most
        order = order[word[order].argsort(stable=True)]
    in_order = sets[order]
    # Numbers begin at 1, but at 0 where all masks are equal: only then is the first no other than the last.
    place = (in_order != in_order.roll(1, 0)).any(1).cumsum(0).clamp_(max=capacity - 1)
    table = sets.new_full((capacity, sets.shape[1]), EVERY_CLASS)
    table.scatter_(0, place[:, None].expand_as(in_order), in_order)
    number = torch.empty_like(order).scatter_(0, order, place)
    return number, table, number < capacity - 1


def _most_sets(patches: int, labels: int, points: int) -> int:
    """How many numbers candidate sets need: each is of two labels of one patch."""
    return min(patches * math.comb(labels + 1, 2), points, MAX_SETS) + 2


@functools.lru_cache(maxsize=8)
def _row_numbers(patches: int, points: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """View (R, 1) and identity (R,) of each row."""
    view = torch.arange(2 * patches, device=device).repeat_interleave(points, output_size=2 * patches * points)
    return view[:, None], torch.arange(patches * points, device=device).repeat(2)


def _move_inside(voxel: torch.Tensor, sizes: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Coordinates (len(sizes), …, 3) to the nearest voxels of volumes of these sizes."""
    first, last = (
        constant(bound, voxel.dtype, voxel.device).view(-1, *[1] * (voxel.dim() - 2), 3)
        for bound in ((0, 0, 0), tuple(tuple(edge - 1 for edge in size) for size in sizes))
    )
    return voxel.clamp(first, last)
