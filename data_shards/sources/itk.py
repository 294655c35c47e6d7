"""NRRD (`.nrrd`, `.nhdr`) and MetaImage (`.mha`, `.mhd`) files → arrays with an affine.

SimpleITK reads them, since it is what wrote most of them and the only kept library that knows both. Two things it
passes over are looked at before: a header that does not say which side is left, and packed data that are damaged.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mixcl_dist.data_shards.volume import CaseError, check_affine, check_voxels, shown

MAX_HEADER_BYTES = CHUNK_BYTES = 1 << 20
NRRD_SPACES = frozenset(
    {"left-posterior-superior", "right-anterior-superior", "left-anterior-superior", "lps", "ras", "las"}
)
"""Those that SimpleITK turns to LPS; it takes any other for LPS without a word."""
PLACING = (
    ("TransformMatrix", "Orientation", "Rotation"),
    ("Offset", "Origin", "Position"),
    ("ElementSpacing", "ElementSize"),
)
"""What a MetaImage header must have to place its voxels, each under one of several names."""
NRRD_MM = {"": 1.0, "mm": 1.0, "um": 1e-3, "µm": 1e-3, "micron": 1e-3, "microns": 1e-3, "cm": 10.0, "m": 1e3}
"""Unit of length, as NRRD headers have it → mm; SimpleITK takes all of them for mm."""
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def itk_files(path: Path) -> tuple[Path, ...]:
    """`path` and, where its voxels lie in a file beside it, that file; raises `CaseError`."""
    fields, _ = _header(path)
    named = fields.get("data file", fields.get("datafile", fields.get("ElementDataFile", "LOCAL")))
    if named.upper() == "LOCAL":
        return (path,)
    data = path.parent / named
    if data.is_file():
        return path, data
    if named.split()[0].upper() == "LIST" or "%" in named:
        raise CaseError("its voxels lie in several files", where=path, cure="write it as one .nrrd or .mha file")
    raise CaseError("the file with its voxels is missing", where=path, cure="restore it, or write one .nrrd or .mha")


def read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The (X, Y, Z) voxels as stored, and their (4, 4) affine → RAS+ mm.

    Raises `CaseError` for a file that is broken, not three-dimensional, holds NaN or infinity, or does not say where
    its voxels lie.
    """
    import SimpleITK as sitk

    fields, begin = _header(path)
    *_, data = itk_files(path)
    _refuse_unplaced(path, fields)
    packed = fields.get("CompressedData", "").lower() == "true"
    unpacked_bytes = _unpacked_bytes(path, data, begin if data == path else 0) if packed else None
    try:
        with _text_name(path, data) as name:
            image = sitk.ReadImage(name, imageIO="NrrdImageIO" if "encoding" in fields else "MetaImageIO")
    except RuntimeError:  # whose text is a page and quotes the header
        raise _unreadable(path, "its header is wrong or its voxels are not all there") from None
    if image.GetNumberOfComponentsPerPixel() > 1 or image.GetDimension() != 3:
        shape = " x ".join(map(str, image.GetSize()))
        what = f"a volume is needed, not {shape} voxels of {image.GetNumberOfComponentsPerPixel()} values"
        raise CaseError(what, where=path, cure="split or stack it into volumes")
    voxels = sitk.GetArrayFromImage(image).T
    if packed and unpacked_bytes != voxels.nbytes:
        raise _unreadable(path, "its voxels are not all there")
    check_voxels(voxels, path)
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    unit, mm = _unit(path, fields)
    affine = np.diag([mm, mm, mm, 1.0]) @ LPS_TO_RAS @ lps
    check_affine(affine, path, unit)
    return voxels, affine


@contextmanager
def _text_name(path: Path, data: Path) -> Iterator[str]:
    """A name of `path` that is text, as SimpleITK needs it, with `data` beside it."""
    if shown(path) == str(path):
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder, "header" + path.suffix)
        header.symlink_to(path)
        if data != path:
            Path(folder, data.name).symlink_to(data)
        yield str(header)


def _unit(path: Path, fields: dict[str, str]) -> tuple[str, float]:
    """The unit of length of an NRRD's space and how many mm it is; raises `CaseError` unless there is one."""
    units = {unit.strip().lower() for unit in fields.get("space units", "").split('"')} - {""} or {""}
    if len(units) > 1 or not units <= NRRD_MM.keys():
        what = "the header gives lengths in several units, or in one that is unknown"
        raise CaseError(what, where=path, cure='write `space units: "mm" "mm" "mm"` and lengths in mm')
    (unit,) = units
    return unit or "mm", NRRD_MM[unit]


def _header(path: Path) -> tuple[dict[str, str], int]:
    """The fields of the header, which ends at the returned byte."""
    fields: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            nrrd = file.read(4) == b"NRRD"
            file.seek(0)
            while file.tell() < MAX_HEADER_BYTES and (line := file.readline(MAX_HEADER_BYTES).decode()):
                key, colon, value = line.partition(":" if nrrd else "=")
                if nrrd and value.startswith("="):  # not the format's own field
                    continue
                if nrrd and not line.strip():
                    return fields, file.tell()
                if colon:
                    fields[key.strip()] = value.strip()
                if not nrrd and key.strip() == "ElementDataFile":
                    return fields, file.tell()
            if nrrd and fields:
                return fields, file.tell()
    except OSError as error:
        raise _unreadable(path, error.strerror or "no such file") from None
    except UnicodeDecodeError:
        pass
    raise _unreadable(path, "no header")


def _refuse_unplaced(path: Path, fields: dict[str, str]) -> None:
    if "ElementDataFile" in fields:
        placed = all(any(name in fields for name in names) for names in PLACING)
    else:
        placed = fields.get("space", "").lower() in NRRD_SPACES and "space directions" in fields
        placed = placed and "space origin" in fields
    if not placed:
        what = "the header does not say which side is left, where the voxels lie, or how far apart"
        raise CaseError(what, where=path, cure="convert the scan again from DICOM")


def _unpacked_bytes(path: Path, data: Path, begin: int) -> int:
    """The size of a MetaImage's packed voxels, whose damage SimpleITK reports nowhere and returns noise."""
    unpacking = zlib.decompressobj(wbits=47)  # zlib or gzip
    size = 0
    with data.open("rb") as file:
        file.seek(begin)
        while not unpacking.eof and (packed := unpacking.unconsumed_tail or file.read(CHUNK_BYTES)):
            try:
                size += len(unpacking.decompress(packed, CHUNK_BYTES))
            except zlib.error as error:
                raise _unreadable(path, str(error)) from None
    return size if unpacking.eof else 0


def _unreadable(path: Path, reason: str) -> CaseError:
    return CaseError(f"cannot be read as {path.suffix}: {reason}", where=path, cure="copy or download it again")
