"""Files of voxels, NIfTI, NRRD or MetaImage by their ending → arrays with an affine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from mixcl_dist.data_shards.sources.case import NIFTI_ENDINGS
from mixcl_dist.data_shards.sources.itk import itk_files, read_itk
from mixcl_dist.data_shards.sources.nifti import nifti_files, read_nifti


def format_of(path: Path) -> Literal["nifti", "itk"]:
    return "nifti" if path.name.lower().endswith(NIFTI_ENDINGS) else "itk"


def files_of(path: Path) -> tuple[Path, ...]:
    """`path` and, where its voxels lie in a file of their own, that file; raises `CaseError`."""
    return nifti_files(path) if format_of(path) == "nifti" else itk_files(path)


def read_voxels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The (X, Y, Z) voxels of `path` and their (4, 4) affine → RAS+ mm; raises `CaseError`."""
    return read_nifti(path) if format_of(path) == "nifti" else read_itk(path)
