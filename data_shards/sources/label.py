"""Label files, masks, ROIs and segments → one array on the image's grid, in the catalogue's numbers.

Where masks, ROIs or segments overlap, a voxel belongs to the smallest of them, as a tumour does within its organ; of
equal ones to the first. Where one of them marks what is to be ignored, it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mixcl_dist.data_shards.catalogue import IGNORED, Catalogue
from mixcl_dist.data_shards.sources.case import BACKGROUND, IGNORE, Case
from mixcl_dist.data_shards.sources.contours import draw_rois, draw_segments
from mixcl_dist.data_shards.sources.voxels import read_voxels
from mixcl_dist.data_shards.volume import CaseError, spacing_of, to_ras

MAX_LABEL_SHIFT = 0.1
"""Of a voxel, between label and image at any corner: more than headers lose by rounding."""
MAX_OFF_WHOLE = 0.01
"""Between a label and a whole number: what a header's slope and intercept, or float arithmetic, leave behind."""


def read_label(case: Case, catalogue: Catalogue, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """The (X, Y, Z) uint8 label in RAS of a case whose image, before it was turned, has `shape` and `affine`.

    Raises `CaseError` for a label that is broken, does not lie on the image's grid, or holds what has no class.
    """
    try:
        codes = {number: _code(name, catalogue) for number, name in case.label_values}
    except KeyError as error:
        raise CaseError(error.args[0], where=case.labels[0], cure="make the catalogue from all sources") from None
    names = dict(case.label_values)
    image, image_affine = to_ras(np.empty(shape, bool), affine)
    if case.label_format == "voxels":
        stored = _on_grid(case.labels[0], image.shape, image_affine)
        return _recoded(stored, codes, case.labels[0])
    if case.label_format == "masks":
        masks = ((number, _mask(case.labels[number - 1], image.shape, image_affine)) for number in names)
    else:
        draw = draw_rois if case.label_format == "rtstruct" else draw_segments
        masks = ((number, to_ras(mask, affine)[0]) for number, mask in draw(case.labels[0], names, shape, affine))
    return merged(((codes[number], mask) for number, mask in masks), image.shape)


def merged(masks: Iterable[tuple[int, np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 label of masks, each with its value; where they overlap the smallest counts, `IGNORED` always."""
    codes, sizes = [0], [np.iinfo(np.int64).max]
    owner = np.zeros(shape, np.uint16)
    for number, (code, mask) in enumerate(masks, start=1):
        codes.append(code)
        sizes.append(-1 if code == IGNORED else int(np.count_nonzero(mask)))
        owner[mask & (np.array(sizes)[owner] > sizes[-1])] = number
    return np.array(codes, np.uint8)[owner]


def _code(name: str, catalogue: Catalogue) -> int:
    reserved = {BACKGROUND: 0, IGNORE: IGNORED}
    return reserved[name] if name in reserved else catalogue.index(name)


def _on_grid(file: Path, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """The voxels of a label file in RAS; raises `CaseError` unless they are those of the image."""
    stored, label_affine = to_ras(*read_voxels(file))
    if stored.shape != shape:
        sizes = " and ".join(" x ".join(map(str, size)) for size in (stored.shape, shape))
        cure = "resample the label to the image's grid"
        raise CaseError(f"label and image differ in size: {sizes} voxels", where=file, cure=cure)
    corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)]) * [*np.array(shape) - 1, 1]
    apart = np.linalg.norm(corners @ (label_affine - affine).T, axis=1).max()
    if apart > MAX_LABEL_SHIFT * min(spacing_of(affine)):
        cure = "copy the image's geometry to the label if their voxels match, else resample it"
        what = f"label lies {apart:.1f} mm off the image: {_difference(label_affine, affine)}"
        raise CaseError(what, where=file, cure=cure)
    return stored


def _difference(label: np.ndarray, image: np.ndarray) -> str:
    """In what two affines of one size differ, each with its own figures, the label's first."""
    spacings = spacing_of(label), spacing_of(image)
    if not np.allclose(*spacings, rtol=1e-3):
        return "its spacing is {} mm, the image's {}".format(*(" x ".join(f"{mm:.4g}" for mm in s) for s in spacings))
    axes = (label[:3, :3] / spacings[0]).T @ (image[:3, :3] / spacings[1])
    turned = np.degrees(np.arccos(np.clip((np.trace(axes) - 1) / 2, -1, 1)))
    if turned > 0.1:
        return f"its axes are turned by {turned:.1f} degrees"
    shift = ", ".join(f"{mm:+.1f}" for mm in label[:3, 3] - image[:3, 3])
    return f"its origin is moved by ({shift}) mm"


def _recoded(stored: np.ndarray, codes: dict[int, int], file: Path) -> np.ndarray:
    """The catalogue's numbers of a label file's values, which are whole within `MAX_OFF_WHOLE`."""
    known = {0: 0} | codes
    found = np.unique(stored)
    whole = np.rint(found)
    if broken := [f"{value:g}" for value in found[np.abs(found - whole) > MAX_OFF_WHOLE]]:
        cure = "write class numbers: was it resampled by more than the nearest voxel, or is it a probability?"
        raise CaseError(f"label holds {_some(broken)}, which is not whole", where=file, cure=cure)
    if wrong := [f"{value:.0f}" for value in np.unique(whole) if value not in known]:
        cure = f"name it under 'labels' or correct the file (named: {', '.join(map(str, sorted(known)[1:]))})"
        raise CaseError(f"label holds {_some(wrong)}, which has no class name", where=file, cure=cure)
    return np.array([known[int(value)] for value in whole], dtype=np.uint8)[np.searchsorted(found, stored)]


def _some(values: Sequence[str]) -> str:
    return ", ".join(values[:5]) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def _mask(file: Path, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Where a file of 0 and one other value, each within `MAX_OFF_WHOLE`, is not 0."""
    stored = _on_grid(file, shape, affine)
    mask = np.abs(stored) > MAX_OFF_WHOLE
    if mask.any() and np.ptp(stored[mask]) > 2 * MAX_OFF_WHOLE:
        what = f"holds several values ({_some([f'{value:g}' for value in np.unique(stored)])}), so it is no mask"
        raise CaseError(what, where=file, cure="write one file of 0 and 1 for each class")
    return mask
