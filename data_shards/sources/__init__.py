"""What the field has on disk → cases: Decathlon and case-list JSON, nnU-Net, masks of classes, folders of scans."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.sources import decathlon, masks, nnunet
from mixcl_dist.data_shards.sources.case import Case, ClassValues, Source
from mixcl_dist.data_shards.sources.classes import mapped, read_class_map
from mixcl_dist.data_shards.sources.dicom import read_series
from mixcl_dist.data_shards.sources.folder import open_folder
from mixcl_dist.data_shards.sources.hounsfield import check_hu
from mixcl_dist.data_shards.sources.images import open_images
from mixcl_dist.data_shards.sources.label import read_label
from mixcl_dist.data_shards.sources.splits import with_splits
from mixcl_dist.data_shards.sources.tree import accounted, files_below, with_leftovers
from mixcl_dist.data_shards.sources.voxels import read_voxels
from mixcl_dist.data_shards.volume import AIR_HU, CaseError, Grid, Volume, resample, to_ras, untilt

__all__ = ["Case", "CaseError", "Source", "open_images", "open_source", "read_case", "read_image", "read_label"]

NNUNET_FOLDERS = {"imagesTs": "withheld for tests", "labelsTs": "withheld for tests", "labelsTr": "labels of no case"}
MASK_FOLDERS = {masks.MASKS: "masks of no class"}


def open_source(path: Path) -> Source:
    """Find the cases of a data set; nothing is read but lists, names, headers of DICOM, RTSTRUCTs.

    `path` is a `dataset.json` (Decathlon or nnU-Net), a JSON list of cases, or a folder: of one of these,
    there named `dataset.json` or `cases.json`, of cases with one mask for each class, or else of files of voxels
    and DICOM series in any depth. A `classes.yaml` beside the list or in the folder names the classes, a
    `splits.json` the cases to train on and those to score. Raises `CaseError` when the source as a whole cannot be
    used; what is wrong with one case is in the source's `problems`.
    """
    path = Path(os.path.abspath(path))  # "." has no name
    file = decathlon.list_file(path)
    folder = path if file is None else file.parent
    classes = read_class_map(folder)
    if file is None and not masks.is_masks(folder):
        tree = files_below(folder)
        return accounted(with_splits(mapped(open_folder(folder, tree, classes), classes, folder), folder), tree)
    content = None if file is None else decathlon.read_json(file)
    unnamed = classes.values() if classes else ()
    source = masks.open_masks(folder) if file is None else _opened(file, content, unnamed)
    source = with_splits(mapped(source, classes, folder), folder)
    if file is None:
        return with_leftovers(source, files_below(folder), MASK_FOLDERS)
    if isinstance(content, dict) and nnunet.is_nnunet(folder, content):
        return with_leftovers(source, files_below(folder), NNUNET_FOLDERS)
    return source


def _opened(file: Path, content: Any, unnamed: ClassValues) -> Source:
    if isinstance(content, list):
        return decathlon.open_case_list(file, content, unnamed)
    if not isinstance(content, dict):
        raise CaseError("lists no cases", where=file, cure="see the formats in the README")
    if nnunet.is_nnunet(file.parent, content):
        return nnunet.open_nnunet(file.parent, content)
    return decathlon.open_dataset(file, content, unnamed)


def read_case(case: Case, catalogue: Catalogue, spacing_mm: Sequence[float] | None = None) -> Volume:
    """Read one case in RAS, int16 HU of at least -1024, at its own spacing or resampled to `spacing_mm`.

    Labels are those of `catalogue`; contours of doubtful classes are kept. Raises `CaseError` for files that
    are broken, are not CT in HU, or whose label does not belong to the image or has values beyond
    `case.label_values`.
    """
    image, grid = read_image(case)
    volume = replace(image, label=read_label(case, catalogue, *grid.upright) if case.labels else None)
    return volume if spacing_mm is None else resample(volume, spacing_mm)


def read_image(case: Case) -> tuple[Volume, Grid]:
    """The voxels of a case as `read_case` has them, without a label, and where its files have them."""
    where = case.files[0]
    voxels, affine = read_series(case.files) if case.format == "dicom" else read_voxels(where)
    check_hu(voxels, where)
    grid = Grid(voxels.shape, affine, untilts=case.format == "dicom")
    upright = untilt(_as_hu(voxels), affine) if grid.untilts else (_as_hu(voxels), affine)
    return Volume(*to_ras(*upright)), grid


def _as_hu(voxels: np.ndarray) -> np.ndarray:
    """Whole HU; what lies below air marks the outside of the scanner's field of view, so it becomes air."""
    whole = voxels if voxels.dtype.kind in "iu" else np.rint(voxels)
    return np.clip(whole, AIR_HU, np.iinfo(np.int16).max).astype(np.int16)
