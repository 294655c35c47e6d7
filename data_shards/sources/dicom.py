"""DICOM CT series → cases under a pseudonym, and their slices → HU with an affine.

Slices are told apart and ordered by their headers alone. Where a slice lies comes from ImagePositionPatient
and ImageOrientationPatient: SliceThickness is not the distance between slices, and InstanceNumber is no
order. Nothing that a header holds, except geometry and modality, leaves this module, in names or in messages.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mixcl_dist.data_shards.sources.case import Case
from mixcl_dist.data_shards.sources.pseudonym import pseudonym
from mixcl_dist.data_shards.volume import AIR_HU, CaseError, check_affine, untilted

if TYPE_CHECKING:
    import pydicom

for library in ("pydicom", "highdicom"):  # whose warnings quote header values
    logging.getLogger(library).propagate = False
    logging.getLogger(library).addHandler(logging.NullHandler())

DATASET = "dicom"
"""A folder may be named after a patient, so its name is not kept either."""
DRAWINGS = frozenset({"SEG", "RTSTRUCT"})
COMPANIONS = DRAWINGS | frozenset({"RTDOSE", "RTPLAN", "RTIMAGE", "REG", "SR", "PR", "KO", "OT", "DOC"})
"""Modalities that describe or derive from a scan; they are counted, and passed over."""
MAX_OFFSET = 0.05
"""How far a slice may lie from its place on an even grid, as a share of the slice distance. Coordinates
rounded to 0.01 mm stay within it down to 0.2 mm slices; one missing or doubled slice exceeds it tenfold."""
AGAIN = "copy it again, or remove it"
HEADER_TAGS = [
    "SOPClassUID",
    "Modality",
    "SeriesInstanceUID",
    "ImageType",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "NumberOfFrames",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "PixelSpacing",
    "FrameOfReferenceUID",
]
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Series:
    """A CT series as a case, and what tells whether something was drawn on it; empty where the header is."""

    case: Case
    uid: str
    frame: str
    """Its frame of reference."""


@dataclass(frozen=True)
class _Slice:
    """What a header says of one slice; positions in mm, towards Left, Posterior, Superior."""

    file: Path
    modality: str
    series: tuple
    frame: str
    localizer: bool
    oddity: tuple[str, str] | None
    """Why it is not one grey image with a place in the patient, and what to do about it."""
    size: tuple[int, int]
    """Columns, rows."""
    orientation: tuple[float, ...]
    position: tuple[float, ...]
    pixel_spacing: tuple[float, ...]


@dataclass(frozen=True)
class Found:
    """What DICOM has among files."""

    series: list[Series]
    drawings: list[Path]
    """RTSTRUCTs and SEGs."""
    companions: dict[Path, str]
    """Other objects that are no scan → their kind."""
    foreign: list[Path]
    """Files that are not DICOM."""
    problems: list[CaseError]
    """One for each file that cannot be read and each series that cannot be used."""


def find_series(files: Sequence[Path]) -> Found:
    """Every CT series among `files` as an unlabelled case, and what else there is."""
    groups: dict[tuple, list[_Slice]] = defaultdict(list)
    found = Found([], [], {}, [], [])
    for file in files:
        try:
            header = _read_header(file)
        except CaseError as problem:
            found.problems.append(problem)
        else:
            if isinstance(header, _Slice):
                groups[header.series].append(header)
            elif header is None:
                found.foreign.append(file)
            elif header in DRAWINGS:
                found.drawings.append(file)
            else:
                found.companions[file] = header
    for slices in groups.values():
        try:
            ordered = _in_order(slices)
        except CaseError as problem:
            found.problems.append(problem)
        else:
            first = ordered[0]
            uid = str(first.series[0]) if len(first.series) == 1 else ""
            # A series without a UID is known by the content of its first slice.
            name = pseudonym(uid or hashlib.sha256(first.file.read_bytes()).hexdigest())
            case = Case(name, DATASET, "unlabelled", "dicom", tuple(one.file for one in ordered))
            found.series.append(Series(case, uid, first.frame))
    return found


def read_series(files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """The (X, Y, Z) int16 HU of the slices in `files`, as stored, and their (4, 4) affine → RAS+ mm.

    Voxels that the scanner marked as padding are air. The affine of a series with a tilted gantry is sheared (see
    `untilt`). Raises `CaseError`.
    """
    from pydicom import dcmread

    headers, images = [], {}
    for file in files:
        with guarded(file):
            dataset = dcmread(file, force=True)
            headers.append(_header(file, dataset))
            images[file] = _hu(dataset, _stored(file, _announced(dataset)))
    ordered = _in_order(headers)
    return np.stack([images[one.file] for one in ordered], axis=-1), _affine(ordered)


@contextmanager
def guarded(file: Path) -> Iterator[None]:
    """Turn whatever a broken file raises in parser or decoder into a `CaseError`; header values stay here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CaseError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise CaseError(f"cannot be read as DICOM ({reason})", where=file, cure=AGAIN) from None


def _read_header(file: Path) -> _Slice | str | None:
    """What is needed of a header; only the kind of what is no scan, None for what is no DICOM."""
    from pydicom import dcmread
    from pydicom.misc import is_dicom
    from pydicom.uid import UID

    with guarded(file):
        if not (file.suffix.lower() in (".dcm", ".dicom", ".ima") or is_dicom(file) or _is_bare(file)):
            return None
        dataset = dcmread(file, stop_before_pixels=True, force=True, specific_tags=HEADER_TAGS)
        kind = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")
        if "Modality" not in dataset and not kind:
            raise ValueError("no DICOM elements")
        modality = str(dataset.get("Modality") or "DICOM without modality")
        if modality in COMPANIONS:
            return modality
        if "Rows" in dataset:
            return _header(file, dataset)
        if modality != "CT" and "Image Storage" not in UID(kind or "").name:
            return modality
    raise CaseError("is a DICOM image of which only the beginning is here", where=file, cure=AGAIN)


def _is_bare(file: Path) -> bool:
    """Whether `file` is DICOM without the preamble that announces it: it begins with a low tag of group 8 or 2."""
    from pydicom import dcmread

    with file.open("rb") as stream:
        first = stream.read(8)
    if len(first) < 8 or not ((first[:2] in (b"\x08\0", b"\x02\0") and not first[3]) or first[:3] == b"\0\x08\0"):
        return False
    with suppress(Exception):  # which pydicom raises of all kinds for what is no DICOM
        return "SOPClassUID" in dcmread(file, stop_before_pixels=True, force=True, specific_tags=["SOPClassUID"])
    return False


def _header(file: Path, dataset: pydicom.Dataset) -> _Slice:
    def numbers(keyword: str, count: int) -> tuple[float, ...]:
        try:
            values = tuple(float(value) for value in dataset[keyword].value)
        except (KeyError, TypeError, ValueError):
            return ()
        return values if len(values) == count else ()

    size = (int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0))
    orientation, position = numbers("ImageOrientationPatient", 6), numbers("ImagePositionPatient", 3)
    pixel_spacing = numbers("PixelSpacing", 2)
    oddity = None
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        oddity = "has multi-frame images", "convert it to NIfTI, e.g. with dcm2niix, or to one file for each slice"
    elif dataset.get("SamplesPerPixel", 1) != 1:
        oddity = "has colour images", "leave it out: it is a picture of a scan, not in HU"
    elif not (orientation and position and pixel_spacing):
        oddity = "has no positions, orientations or pixel spacings", "convert it to NIfTI if it is a scan"
    modality, uid = str(dataset.get("Modality") or "unknown"), dataset.get("SeriesInstanceUID")
    frame = dataset.get("FrameOfReferenceUID")
    return _Slice(
        file=file,
        modality=modality,
        series=(uid,) if uid else (file.parent, modality, frame, size, orientation, pixel_spacing),
        frame=str(frame or ""),
        localizer="LOCALIZER" in (dataset.get("ImageType") or ()),
        oddity=oddity,
        size=size,
        orientation=orientation,
        position=position,
        pixel_spacing=pixel_spacing,
    )


def _in_order(slices: Sequence[_Slice]) -> list[_Slice]:
    """The slices of one series from bottom to top; raises `CaseError` unless they stack to a CT volume."""

    def refuse(what: str, cure: str) -> CaseError:
        return CaseError(f"series of {len(slices)} file(s) {what}", where=slices[0].file, cure=cure)

    modalities = sorted({one.modality for one in slices} - {"CT"})
    if modalities:
        raise refuse(f"is {', '.join(modalities)}, not CT", "leave it out")
    if any(one.localizer for one in slices):
        raise refuse("holds a localizer", "leave the localizer out")
    if oddity := next((one.oddity for one in slices if one.oddity), None):
        raise refuse(*oddity)
    if len(slices) == 1:
        raise refuse("has a single slice", "add the other slices or leave it out")
    if len({one.size for one in slices}) > 1 or not all(
        np.allclose(one.orientation + one.pixel_spacing, slices[0].orientation + slices[0].pixel_spacing, atol=1e-4)
        for one in slices
    ):
        raise refuse("mixes image sizes, orientations or pixel spacings", "split it into one folder for each")
    normal = np.cross(slices[0].orientation[:3], slices[0].orientation[3:])
    ordered = sorted(slices, key=lambda one: float(np.dot(one.position, normal)))
    positions = np.array([one.position for one in ordered])
    gaps = np.diff(positions @ normal)
    if gaps.min() < 1e-3:
        twice = int(np.sum(gaps < 1e-3))
        raise refuse(f"has {twice} slices where another one lies", "remove copies, or split phases into series")
    check_affine(untilted(_affine(ordered)), slices[0].file)
    even = np.linspace(positions[0], positions[-1], len(positions))
    if np.linalg.norm(positions - even, axis=1).max() > MAX_OFFSET * gaps.mean():
        shown = f"from {gaps.min():.2f} to {gaps.max():.2f} mm"
        raise refuse(f"has uneven gaps between slices, {shown}", "restore missing slices, or resample it")
    return ordered


def _affine(ordered: Sequence[_Slice]) -> np.ndarray:
    """(4, 4) voxel index (column, row, slice) → RAS+ mm, from positions alone."""
    one, positions = ordered[0], np.array([one.position for one in ordered])
    row_spacing, column_spacing = one.pixel_spacing  # between rows first, as DICOM has it
    lps = np.eye(4)
    lps[:3, 0] = np.multiply(one.orientation[:3], column_spacing)
    lps[:3, 1] = np.multiply(one.orientation[3:], row_spacing)
    lps[:3, 2] = (positions[-1] - positions[0]) / (len(positions) - 1)
    lps[:3, 3] = positions[0]
    return LPS_TO_RAS @ lps


def _announced(dataset: pydicom.FileDataset) -> pydicom.FileDataset:
    """`dataset` with the encoding that its missing preamble would have told; nothing else is packed there."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _stored(file: Path, dataset: pydicom.FileDataset) -> np.ndarray:
    """The (rows, columns) values of one slice; raises `CaseError` for what is whole and cannot be decoded here."""
    from pydicom.encaps import get_frame
    from pydicom.uid import UID

    if not {"PixelData", "FloatPixelData", "DoubleFloatPixelData"} & set(dataset.dir()):
        raise CaseError("is a DICOM image without voxels", where=file, cure=AGAIN)
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    known = f"{syntax.name} (transfer syntax {syntax})" if syntax.name != syntax else "a private transfer syntax"
    unpack = "unpack it first, e.g. with `gdcmconv --raw` or `dcmdjpeg`"
    try:
        return dataset.pixel_array
    except NotImplementedError:
        raise CaseError(f"voxels are packed as {known}, which is not read", where=file, cure=unpack) from None
    except Exception:
        if not syntax.is_encapsulated or not get_frame(dataset.PixelData, 0, number_of_frames=1).rstrip(
            b"\0\xff"
        ).endswith(b"\xff\xd9"):
            raise
        what = f"voxels are packed as {known}, in a process that cannot be decoded here, though they are all there"
        raise CaseError(what, where=file, cure=f"{unpack}; copy it again if that fails") from None


def _hu(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """The (columns, rows) int16 HU of one slice; padding is air."""
    hu = np.rint(stored * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0)))
    padding = dataset.get("PixelPaddingValue")
    if padding is not None:
        limit = dataset.get("PixelPaddingRangeLimit", padding)
        hu[(stored >= min(padding, limit)) & (stored <= max(padding, limit))] = AIR_HU
    return np.clip(hu, np.iinfo(np.int16).min, np.iinfo(np.int16).max).astype(np.int16).T
