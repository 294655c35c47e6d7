"""NIfTI files → arrays with an affine."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

from mixcl_dist.data_shards.volume import CaseError, check_affine, check_voxels

UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The (X, Y, Z) voxels as stored, scaled by the header's slope, and their (4, 4) affine → RAS+ mm.

    The affine is the sform where the header has one, else the qform. Raises `CaseError` for a file that is
    broken, not three-dimensional, holds NaN or infinity, or does not say where its voxels lie.
    """
    try:
        image = _parse(path.read_bytes())
        voxels, affine, header = np.asanyarray(image.dataobj), image.affine, image.header
    except UNREADABLE as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
        cure = "copy or download it again"
        raise CaseError(f"cannot be read as NIfTI: {reason}", where=path, cure=cure) from None
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    check_voxels(voxels, path)
    if not header["sform_code"] and not header["qform_code"]:
        cure = "convert the scan again from DICOM"
        raise CaseError("the header does not say which side is left (no sform, no qform)", where=path, cure=cure)
    affine = np.asarray(affine, dtype=np.float64)
    check_affine(affine, path)
    return voxels, affine


def _parse(content: bytes) -> nib.Nifti1Image:
    # Unpacked whole, since only the end of a gzip stream carries its checksum and nibabel stops before it.
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        if kind.header_class.may_contain_header(content[: kind.header_class.sizeof_hdr]):
            return kind.from_bytes(content)
    raise ValueError("no NIfTI header")
