"""What the field has on disk → cases: Decathlon and case-list JSON, nnU-Net, folders of NIfTI and DICOM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.sources import decathlon, nnunet
from mixcl_dist.data_shards.sources.case import Case, ClassValues, Source
from mixcl_dist.data_shards.sources.dicom import read_series
from mixcl_dist.data_shards.sources.folder import open_folder
from mixcl_dist.data_shards.sources.nifti import read_nifti
from mixcl_dist.data_shards.volume import AIR_HU, CaseError, Volume, resample, spacing_of, to_ras

__all__ = ["Case", "CaseError", "Source", "open_source", "read_case"]

FAT_HU, SOFT_TISSUE_HU = -50, -300
"""Any CT, even cut out around an organ, has voxels of fat, lung or bowel gas below the first and of tissue
above the second. Masks, PET and MR have none below; a CT stored with 1024 added neither."""
MIN_SHARE = 1e-3
MIN_VALUES = 50
MAX_LABEL_SHIFT = 0.1
"""Of a voxel, between label and image at any corner: more than headers lose by rounding."""


def open_source(path: Path) -> Source:
    """Find the cases of a data set; nothing is read but lists, names and DICOM headers.

    `path` is a `dataset.json` (Decathlon or nnU-Net), a JSON list of cases, or a folder: of one of these,
    there named `dataset.json` or `cases.json`, or else of NIfTI files and DICOM series in any depth. Raises
    `CaseError` when the source as a whole cannot be used; what is wrong with one case is in the source's
    `problems`.
    """
    path = Path(os.path.abspath(path))  # "." has no name
    if path.is_dir():
        listed = next((path / name for name in ("dataset.json", "cases.json") if (path / name).exists()), None)
        if listed is None:
            return open_folder(path)
        path = listed
    if path.exists() and path.suffix != ".json":
        raise CaseError("is no data set", where=path, cure="give a folder or a JSON file that lists cases")
    content = decathlon.read_json(path)
    if isinstance(content, list):
        return decathlon.open_case_list(path, content)
    if not isinstance(content, dict):
        raise CaseError("lists no cases", where=path, cure="see the formats in the README")
    if nnunet.is_nnunet(path.parent, content):
        return nnunet.open_nnunet(path.parent, content)
    return decathlon.open_dataset(path, content)


def read_case(case: Case, catalogue: Catalogue, spacing_mm: Sequence[float] | None = None) -> Volume:
    """Read one case in RAS, int16 HU of at least -1024, at its own spacing or resampled to `spacing_mm`.

    Labels are those of `catalogue`; contours of doubtful classes are kept. Raises `CaseError` for files that
    are broken, are not CT in HU, or whose label does not belong to the image or has values beyond
    `case.label_values`.
    """
    if case.format == "dicom":
        voxels, stored_affine = read_series(case.files)
    else:
        voxels, stored_affine = read_nifti(case.files[0])
    hu, affine = to_ras(_as_hu(voxels), stored_affine)
    _refuse_unless_ct(hu, case.files[0])
    label = None if case.label is None else _read_label(case.label, case.label_values, catalogue, hu.shape, affine)
    volume = Volume(hu, affine, label)
    return volume if spacing_mm is None else resample(volume, spacing_mm)


def _as_hu(voxels: np.ndarray) -> np.ndarray:
    """Whole HU; what lies below air marks the outside of the scanner's field of view, so it becomes air."""
    return np.clip(np.rint(voxels), AIR_HU, np.iinfo(np.int16).max).astype(np.int16)


def _refuse_unless_ct(hu: np.ndarray, where: Path) -> None:
    counts = np.zeros(np.iinfo(np.int16).max - AIR_HU + 1, dtype=np.int64)
    for plane in hu:
        counts += np.bincount(plane.ravel().astype(np.int32) - AIR_HU, minlength=len(counts))
    counts[0] = 0  # outside of the field of view, or set there by whoever masked the scan
    share = np.cumsum(counts) / max(1, counts.sum())  # of voxels up to each HU
    if np.count_nonzero(counts) < MIN_VALUES:
        what = f"has only {np.count_nonzero(counts)} different values: a mask rather than a CT"
    elif share[FAT_HU - AIR_HU] < MIN_SHARE:
        what = f"has next to nothing below {FAT_HU} HU, so no air or fat: not a CT in HU"
    elif 1 - share[SOFT_TISSUE_HU - AIR_HU] < MIN_SHARE:
        what = f"has next to nothing above {SOFT_TISSUE_HU} HU: only air"
    else:
        return
    raise CaseError(what, where=where, cure="leave it out, or convert its values to HU")


def _read_label(
    file: Path, values: ClassValues, catalogue: Catalogue, shape: tuple[int, ...], affine: np.ndarray
) -> np.ndarray:
    """The (X, Y, Z) uint8 label in RAS, in the catalogue's numbers, of an image of that shape and affine."""
    stored, label_affine = to_ras(*read_nifti(file))
    if stored.shape != shape:
        sizes = " and ".join(" x ".join(map(str, size)) for size in (stored.shape, shape))
        cure = "resample the label to the image's grid"
        raise CaseError(f"label and image differ in size: {sizes} voxels", where=file, cure=cure)
    corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)]) * [*np.array(shape) - 1, 1]
    apart = np.linalg.norm(corners @ (label_affine - affine).T, axis=1).max()
    if apart > MAX_LABEL_SHIFT * min(spacing_of(affine)):
        cure = "copy the image's geometry to the label if their voxels match, else resample it"
        raise CaseError(f"label lies {apart:.1f} mm off the image", where=file, cure=cure)
    try:
        known = {0: 0} | {value: catalogue.index(name) for value, name in values}
    except KeyError as error:
        raise CaseError(error.args[0], where=file, cure="make the catalogue from all sources") from None
    found = np.unique(stored)
    wrong = [f"{value:g}" for value in found if value not in known]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        cure = f"name it under 'labels' or correct the file (named: {', '.join(map(str, sorted(known)[1:]))})"
        raise CaseError(f"label holds {shown}, which has no class name", where=file, cure=cure)
    return np.array([known[int(value)] for value in found], dtype=np.uint8)[np.searchsorted(found, stored)]
