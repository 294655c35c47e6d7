"""RTSTRUCT and DICOM-SEG as labels of the CT series that they were drawn on.

An object belongs to the series that it references or, since copies of a scan get other UIDs, to the only series in its
frame of reference. The names of ROIs and segments are written by people and may hold those of patients: they are
looked up in `classes.yaml`, and messages tell none but those made of anatomists' words.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from mixcl_dist.data_shards.sources.case import Case, ClassValues
from mixcl_dist.data_shards.sources.dicom import LPS_TO_RAS, Series, guarded
from mixcl_dist.data_shards.volume import CaseError

if TYPE_CHECKING:
    import pydicom

logger = logging.getLogger(__name__)

CLOSED = frozenset({"CLOSED_PLANAR", "CLOSEDPLANAR_XOR"})
MAX_OFF_GRID = 0.1
"""Of a voxel, between a contour and its slice or a segment's voxels and the image's."""

PLANNING_WORDS = frozenset({
    "avoidance", "bowel", "brainstem", "cochlea", "ct", "ctv", "external", "gtv", "itv", "l", "lens", "lesion", "lt",
    "mass", "neoplasm", "node", "nodes", "oar", "oesophagus", "parotids", "pet", "prv", "ptv", "r", "roi", "rt",
    "tumor", "tumour",
})  # fmt: skip
"""What planners call structures by, beside anatomical terms."""


@dataclass(frozen=True)
class _Drawing:
    """What one RTSTRUCT or SEG says of itself."""

    file: Path
    format: Literal["rtstruct", "seg"]
    series: frozenset[str]
    frames: frozenset[str]
    structures: ClassValues
    """Number → name, of those that were drawn and are listed."""
    unlisted: tuple[str, ...]
    """Names of the others, where a name may be told, or else an empty string."""


@dataclass(frozen=True)
class Labelled:
    """Series with what was drawn on them."""

    cases: list[Case] = field(default_factory=list)
    problems: list[CaseError] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    """Names of structures that nobody listed; an empty string for one that may not be told."""


def with_drawings(found: Sequence[Series], files: Sequence[Path], listed: frozenset[str]) -> Labelled:
    """The series' cases, with the RTSTRUCT or SEG among `files` that has structures named in `listed`.

    Their `label_values` hold names as they stand in the object, to be mapped to classes at once. A series that several
    objects fit becomes a problem, and so does an object that fits none or several.
    """
    of_series: dict[int, list[_Drawing]] = defaultdict(list)
    labelled = Labelled()
    cases, problems, unlisted = labelled.cases, labelled.problems, labelled.unlisted
    for file in files:
        try:
            drawing = _read_drawing(file, listed)
            unlisted += drawing.unlisted
            if drawing.structures:
                of_series[_fitting(drawing, found)].append(drawing)
        except CaseError as problem:
            problems.append(problem)
    if unlisted:
        logger.info("%d ROIs and segments of %d objects belong to no class", len(unlisted), len(files))
    for number, one in enumerate(found):
        drawings = of_series[number]
        if len(drawings) > 1:
            what = f"series of {len(one.case.files)} files has {len(drawings)} RTSTRUCTs or SEGs with listed classes"
            problems.append(CaseError(what, where=one.case.files[0], cure=f"keep one, e.g. {drawings[0].file}"))
        else:
            cases.append(_labelled(one.case, drawings[0]) if drawings else one.case)
    return labelled


def draw_rois(
    file: Path, classes: Mapping[int, str], shape: Sequence[int], affine: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """The ROIs of an RTSTRUCT that are numbered in `classes`, as masks of `shape` on the grid of `affine` (→ RAS+ mm).

    The grid's third axis runs along the slices that the contours were drawn on. A voxel belongs to a ROI when its
    centre lies within an odd number of its contours, so one within another is a hole. Contours beyond the grid are
    cut off. Raises `CaseError` for open contours, for those between slices, and for a ROI that skips slices.
    """
    from pydicom import dcmread

    with guarded(file):
        contours = {
            int(roi.ReferencedROINumber): [
                (one.ContourGeometricType, np.array(one.ContourData, float)) for one in drawn
            ]
            for roi in dcmread(file, force=True).ROIContourSequence
            if int(roi.ReferencedROINumber) in classes and (drawn := roi.get("ContourSequence"))
        }
    to_index = np.linalg.inv(affine) @ LPS_TO_RAS
    for number, drawn in contours.items():

        def refuse(what: str, cure: str, name: str = classes[number]) -> CaseError:
            return CaseError(f"{what} of {name}", where=file, cure=cure)

        if not all(kind in CLOSED for kind, _ in drawn):
            raise refuse("contours are open or points, those", "close them, or leave it out of classes.yaml")
        polygons = [points.reshape(-1, 3) @ to_index[:3, :3].T + to_index[:3, 3] for _, points in drawn]
        slices = [round(float(polygon[:, 2].mean())) for polygon in polygons]
        if any(np.abs(polygon[:, 2] - k).max() > MAX_OFF_GRID for polygon, k in zip(polygons, slices, strict=True)):
            raise refuse("contours lie between the slices, those", "give the series that they were drawn on")
        if not any(0 <= k < shape[2] for k in slices):
            raise refuse("contours lie outside of the series, those", "give the series that they were drawn on")
        if len(set(slices)) > 2 and np.median(np.diff(sorted(set(slices)))) > 1:
            raise refuse("contours skip slices, those", "interpolate them where they were drawn")
        yield number, fill(list(zip(slices, (polygon[:, :2] for polygon in polygons), strict=True)), shape)


def fill(polygons: Sequence[tuple[int, np.ndarray]], shape: Sequence[int]) -> np.ndarray:
    """The (X, Y, Z) mask of polygons, each with its slice k and its (n, 2) corners in voxels; even-odd rule."""
    mask = np.zeros(shape, bool)
    for k in {k for k, _ in polygons if 0 <= k < shape[2]}:
        flips = np.zeros((shape[0] + 1, shape[1]), bool)  # where, along x, inside and outside change places
        for corners in (corners for slice_, corners in polygons if slice_ == k):
            begin, end = corners[:, None], np.roll(corners, -1, axis=0)[:, None]
            y = np.arange(shape[1])
            edge, row = np.nonzero((begin[..., 1] <= y) != (end[..., 1] <= y))
            (x0, y0), (x1, y1) = begin[edge, 0].T, end[edge, 0].T
            first = np.floor(x0 + (row - y0) / (y1 - y0) * (x1 - x0)).astype(int) + 1
            np.logical_xor.at(flips, (np.clip(first, 0, shape[0]), row), True)
        mask[:, :, k] = np.logical_xor.accumulate(flips, axis=0)[:-1]
    return mask


def draw_segments(
    file: Path, classes: Mapping[int, str], shape: Sequence[int], affine: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """The segments of a SEG that are numbered in `classes`, as masks of `shape` on the grid of `affine` (→ RAS+ mm).

    Raises `CaseError` for fractional segments and for a grid other than the image's.
    """
    import highdicom

    with guarded(file):
        seg = highdicom.seg.segread(file)
    if seg.segmentation_type == highdicom.seg.SegmentationTypeValues.FRACTIONAL:
        raise CaseError("segments are fractions", where=file, cure="threshold them to binary ones")
    for number in classes:
        with guarded(file):
            volume = seg.get_volume(segment_numbers=[number], combine_segments=False)
        stored = np.asarray(volume.array)[..., 0].T != 0  # from (slice, row, column) to (column, row, slice)
        yield number, _pasted(file, stored, LPS_TO_RAS @ volume.affine[:, [2, 1, 0, 3]], shape, affine)


def _pasted(
    file: Path, stored: np.ndarray, stored_affine: np.ndarray, shape: Sequence[int], affine: np.ndarray
) -> np.ndarray:
    """A mask that covers a part of the grid, on all of it."""
    to_image = np.linalg.inv(affine) @ stored_affine
    axes = np.abs(to_image[:3, :3]).argmax(axis=0)
    ends = np.array([[0, 0, 0], np.array(stored.shape) - 1]) @ to_image[:3, :3].T + to_image[:3, 3]
    lower, upper = np.rint(ends.min(axis=0)).astype(int), np.rint(ends.max(axis=0)).astype(int) + 1
    turned = np.zeros((3, 3))
    turned[axes, range(3)] = np.sign(to_image[axes, range(3)])
    span = np.array(stored.shape) - 1
    off = np.abs((to_image[:3, :3] - turned) @ np.diag(span)).max(initial=0.0)
    if sorted(axes) != [0, 1, 2] or max(off, np.abs(ends - np.rint(ends)).max()) > MAX_OFF_GRID:
        cure = "give the series that they were made from, or resample them"
        raise CaseError("segments lie on another grid than the series", where=file, cure=cure)
    if (lower < 0).any() or (upper > shape).any():
        raise CaseError("segments reach beyond the series", where=file, cure="restore the series' missing slices")
    flips = tuple(slice(None, None, int(turned[axis, n])) for n, axis in enumerate(axes))
    mask = np.zeros(shape, bool)
    mask[tuple(map(slice, lower, upper))] = stored[flips].transpose(np.argsort(axes))
    return mask


def _labelled(case: Case, drawing: _Drawing) -> Case:
    names = tuple(dict.fromkeys(name for _, name in drawing.structures))
    return replace(
        case,
        split="training",
        labels=(drawing.file,),
        label_values=drawing.structures,
        annotated=names,
        label_format=drawing.format,
    )


def _fitting(drawing: _Drawing, found: Sequence[Series]) -> int:
    """The position in `found` of the series that it was drawn on."""
    referenced = [n for n, one in enumerate(found) if one.uid and one.uid in drawing.series]
    framed = [n for n, one in enumerate(found) if one.frame and one.frame in drawing.frames]
    if referenced and not set(referenced) & set(framed):
        what = "lies in another frame of reference than the series that it references"
        raise CaseError(what, where=drawing.file, cure="register it to the series, or leave it out")
    fitting = [n for n in referenced if n in framed] or framed
    if len(fitting) != 1:
        what = f"fits {len(fitting)} of {len(found)} CT series here"
        raise CaseError(what, where=drawing.file, cure="put it into one folder with the series that it was drawn on")
    return fitting[0]


def _read_drawing(file: Path, listed: frozenset[str]) -> _Drawing:
    from pydicom import dcmread

    with guarded(file):
        dataset = dcmread(file, force=True, stop_before_pixels=True)
        return (_rtstruct if dataset.Modality == "RTSTRUCT" else _seg)(file, dataset, listed)


def _rtstruct(file: Path, dataset: pydicom.Dataset, listed: frozenset[str]) -> _Drawing:
    drawn = {int(roi.ReferencedROINumber) for roi in dataset.ROIContourSequence if roi.get("ContourSequence")}
    rois = [(int(roi.ROINumber), str(roi.ROIName), roi) for roi in dataset.StructureSetROISequence]
    used = [(number, name, roi) for number, name, roi in rois if number in drawn and _listed(name, listed)]
    references = dataset.get("ReferencedFrameOfReferenceSequence") or ()
    studies = (study for one in references for study in one.get("RTReferencedStudySequence") or ())
    series = (str(one.SeriesInstanceUID) for study in studies for one in study.get("RTReferencedSeriesSequence") or ())
    frames = {str(roi.get("ReferencedFrameOfReferenceUID") or "") for _, _, roi in used} - {""}
    frames = frames or {str(one.FrameOfReferenceUID) for one in references}
    if len(frames) > 1:
        raise CaseError("has ROIs in several frames of reference", where=file, cure="split it into one for each")
    structures = tuple((number, name) for number, name, _ in used)
    unlisted = [name for number, name, _ in rois if number in drawn and not _listed(name, listed)]
    return _Drawing(file, "rtstruct", frozenset(series), frozenset(frames), structures, _told(unlisted, dataset))


def _seg(file: Path, dataset: pydicom.Dataset, listed: frozenset[str]) -> _Drawing:
    structures, others = [], []
    for segment in dataset.SegmentSequence:
        names = [str(segment.get("SegmentLabel") or "")]
        names += [str(code.get("CodeMeaning") or "") for code in segment.get("SegmentedPropertyTypeCodeSequence") or ()]
        hits = [(int(segment.SegmentNumber), name) for name in names if _listed(name, listed)]
        structures += hits[:1]
        others += [] if hits else names[:1]
    series = (str(one.SeriesInstanceUID) for one in dataset.get("ReferencedSeriesSequence") or ())
    frame = str(dataset.get("FrameOfReferenceUID") or "")
    told = _told(others, dataset)
    return _Drawing(file, "seg", frozenset(series), frozenset({frame}), tuple(structures), told)


def _listed(name: str, listed: frozenset[str]) -> bool:
    return name.strip().casefold() in listed


def _told(names: Sequence[str], dataset: pydicom.Dataset) -> tuple[str, ...]:
    """Those of `names` that are made of anatomists' and planners' words and are no part of the patient's name or ID."""
    patient = {word for key in ("PatientName", "PatientID") for word in _words(str(dataset.get(key) or ""))}
    return tuple(name if set(_words(name)) <= _vocabulary() - patient else "" for name in names)


def _words(name: str) -> list[str]:
    """The words of `name`, parted at capitals, and numbers of more than two digits, in lower case."""
    words = re.findall(r"\d{3,}|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+", name)
    return [word.casefold() for word in words]


@functools.cache
def _vocabulary() -> frozenset[str]:
    from pydicom.sr.codedict import codes

    return PLANNING_WORDS.union(*(map(_words, codes.CID7192.dir())), "lr")
