"""NIfTI files, single or a pair of header and voxels → arrays with an affine."""

from __future__ import annotations

import gzip
import math
import zlib
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.fileholders import FileHolder

from mixcl_dist.data_shards.volume import CaseError, check_affine, check_voxels

UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    ArithmeticError,  # of sizes and places that no file has
    MemoryError,
    zlib.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)

PAIR_ENDINGS = (".img", ".img.gz", ".IMG", ".IMG.GZ")
MM = {1: ("metres", 1e3), 3: ("microns", 1e-3)}
"""Code of a header's unit of length, where it is not mm or unknown → its name, and mm in it."""


def nifti_files(path: Path) -> tuple[Path, ...]:
    """`path` and, where it is the header of a pair, the file of its voxels; raises `CaseError`."""
    begin = path.name.lower().rfind(".hdr")
    if begin < 0:
        return (path,)
    for ending in PAIR_ENDINGS:
        if (data := path.with_name(path.name[:begin] + ending)).is_file():
            return path, data
    raise CaseError("the .img file with its voxels is missing", where=path, cure="restore it, or write one .nii.gz")


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The (X, Y, Z) voxels as stored, scaled by the header's slope, and their (4, 4) affine → RAS+ mm.

    The affine is the sform where the header has one, else the qform, in the header's unit of length. Raises
    `CaseError` for a file that is broken, not three-dimensional, holds NaN or infinity, or does not say where its
    voxels lie.
    """
    files = nifti_files(path)
    try:
        contents = [_unpacked(file.read_bytes()) for file in files]
        image = _parse(*contents)
        stated = math.prod(map(int, image.shape)) * image.get_data_dtype().itemsize
        if stated > len(contents[-1]):  # before memory is taken for it
            raise ValueError(f"{stated} bytes of voxels are stated, of which at most {len(contents[-1])} are there")
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
    unit, mm = MM.get(int(header["xyzt_units"]) & 7, ("mm", 1.0))
    affine = np.diag([mm, mm, mm, 1.0]) @ np.asarray(affine, dtype=np.float64)
    check_affine(affine, path, unit)
    return voxels, affine


def _unpacked(content: bytes) -> bytes:
    # Whole, since only the end of a gzip stream carries its checksum and nibabel stops before it.
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def _parse(content: bytes, voxels: bytes | None = None) -> nib.Nifti1Pair:
    """The image in one file, or in a header and its voxels."""
    for single, pair in ((nib.Nifti1Image, nib.Nifti1Pair), (nib.Nifti2Image, nib.Nifti2Pair)):
        if single.header_class.may_contain_header(content[: single.header_class.sizeof_hdr]):
            if voxels is None:
                return single.from_bytes(content)
            holders = {"header": FileHolder(fileobj=BytesIO(content)), "image": FileHolder(fileobj=BytesIO(voxels))}
            return pair.from_file_map(holders)
    raise ValueError("no NIfTI header")
