"""RTSTRUCT and DICOM-SEG become labels of the series that they were drawn on, or one line says why not."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import highdicom
import matplotlib.path
import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.sr.codedict import codes

from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.sources import CaseError, open_images, open_source, read_case
from mixcl_dist.data_shards.sources.contours import fill
from mixcl_dist.data_shards.volume import to_ras

TUMOUR = Catalogue(("tumour",))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def pseudonym_key(monkeypatch):
    monkeypatch.setenv("MIXCL_PSEUDONYM_KEY", "key of the tests")


def copied(folder: Path, to: Path, classes: str) -> Path:
    shutil.copytree(folder, to, copy_function=shutil.copyfile)
    for part in (to, *(path for path in to.rglob("*") if path.is_dir())):
        part.chmod(0o755)
    (to / "classes.yaml").write_text(classes)
    return to


@pytest.fixture
def series(ct, tmp_path) -> Path:
    """48 slices and their RTSTRUCT, to be spoilt."""
    return copied(ct / "sarcoma/STS_002/dicom", tmp_path / "series", "tumour: {source: gtv_mass_ct}")


@pytest.fixture
def change(series) -> Callable[[Callable[[pydicom.Dataset], object]], Path]:
    """Applies a function to the RTSTRUCT of `series`."""

    def apply(function: Callable[[pydicom.Dataset], object]) -> Path:
        dataset = pydicom.dcmread(series / "rtstruct/RS.dcm")
        function(dataset)
        dataset.save_as(series / "rtstruct/RS.dcm")
        return series

    return apply


def label_of(folder: Path) -> np.ndarray:
    source = open_source(folder)
    assert source.problems == ()
    (case,) = source.cases
    assert (case.split, case.annotated) == ("training", ("tumour",))
    return read_case(case, Catalogue(source.classes)).label


def truth(ct: Path, name: str = "STS_002") -> np.ndarray:
    """The mask that the data set gives beside its RTSTRUCT."""
    mask = nib.load(ct / "sarcoma" / name / "nifti/mask.nii.gz")
    return to_ras(np.asanyarray(mask.dataobj), mask.affine)[0]


def contours(dataset: pydicom.Dataset) -> list[pydicom.Dataset]:
    return list(dataset.ROIContourSequence[0].ContourSequence)


def points(contour: pydicom.Dataset) -> np.ndarray:
    return np.array(contour.ContourData, float).reshape(-1, 3)


def set_points(contour: pydicom.Dataset, corners: np.ndarray) -> None:
    contour.ContourData = [f"{value:.6f}" for value in corners.ravel()]
    contour.NumberOfContourPoints = len(corners)


# --- RTSTRUCT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["STS_001", "STS_002"])
def test_contours_are_the_mask_that_the_data_set_gives_voxel_for_voxel(ct, tmp_path, name):
    """The RTSTRUCT references other UIDs than those of its series; only the frame of reference agrees."""
    folder = copied(ct / "sarcoma" / name / "dicom", tmp_path / "series", "tumour: {source: GTV_Mass_CT}")
    np.testing.assert_array_equal(label_of(folder), truth(ct, name))


def test_without_a_class_map_contours_are_not_read_and_it_is_said(series, caplog):
    (series / "classes.yaml").unlink()
    source = open_source(series)
    assert source.problems == () and [(case.split, case.labels) for case in source.cases] == [("unlabelled", ())]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{series}: labels in RTSTRUCTs and SEGs are not read, as no classes.yaml")
    assert "(there are GTV_Mass_CT)" in said and "write one, as in `liver: {source: Liver}`" in said
    caplog.clear()
    open_images(series)
    assert not caplog.records, "labels are not asked for"


def test_an_unreadable_drawing_matters_where_labels_are_asked_for_alone(series, change):
    change(lambda dataset: dataset.__delitem__("StructureSetROISequence"))
    assert "cannot be read as DICOM" in problems_of(series)
    (series / "classes.yaml").unlink()
    assert open_source(series).problems == ()


def test_order_and_orientation_of_slices_do_not_matter_to_contours(ct, series):
    """A series seen from above: rows run to the left, columns to the back, slices downwards."""
    for file in (series / "ct").iterdir():
        dataset = pydicom.dcmread(file)
        x, y, z = map(float, dataset.ImagePositionPatient)
        dataset.PixelData = dataset.pixel_array[:, ::-1].tobytes()
        dataset.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = [x + (dataset.Columns - 1) * float(dataset.PixelSpacing[1]), y, z]
        dataset.save_as(file)
    np.testing.assert_array_equal(label_of(series), truth(ct))


def test_a_contour_within_another_is_a_hole(ct, change):
    def with_holes(dataset: pydicom.Dataset) -> None:
        for outer in contours(dataset):
            hole = copy.deepcopy(outer)
            set_points(hole, points(outer).mean(axis=0) + 0.4 * (points(outer) - points(outer).mean(axis=0)))
            dataset.ROIContourSequence[0].ContourSequence.append(hole)

    label = label_of(change(with_holes))
    whole = truth(ct)
    assert 0.5 < label.sum() / whole.sum() < 0.95 and not (label > whole).any()


def test_a_keyhole_is_a_hole(ct, change):
    """One closed line that goes in, round and out again over the same cut."""

    def keyhole(dataset: pydicom.Dataset) -> None:
        for outer in contours(dataset):
            corners = points(outer)
            inner = corners.mean(axis=0) + 0.4 * (corners - corners.mean(axis=0))
            set_points(outer, np.concatenate([corners, corners[:1], inner[:1], inner[::-1]]))

    label = label_of(change(keyhole))
    assert 0.5 < label.sum() / truth(ct).sum() < 0.95


def test_contours_of_a_tilted_series_lie_on_its_slices(ct, series, change):
    """Planes and contours turned together by 15 degrees about the rows."""
    before = read_case(open_source(series).cases[0], TUMOUR)
    turned = np.array([0, np.cos(np.radians(15)), np.sin(np.radians(15))])
    origins = {}
    for file in (series / "ct").iterdir():
        dataset = pydicom.dcmread(file)
        origins[round(float(dataset.ImagePositionPatient[2]), 2)] = np.array(dataset.ImagePositionPatient, float)
        dataset.ImageOrientationPatient = [1, 0, 0, *(f"{value:.9f}" for value in turned)]
        dataset.save_as(file)

    def lean(dataset: pydicom.Dataset) -> None:
        for contour in contours(dataset):
            origin = origins[round(points(contour)[0, 2], 2)]
            x, y, _ = (points(contour) - origin).T
            set_points(contour, origin + x[:, None] * [1, 0, 0] + y[:, None] * turned)

    after = read_case(open_source(change(lean)).cases[0], TUMOUR)
    assert after.hu.shape[1] > before.hu.shape[1]
    for k in np.flatnonzero(before.label.any((0, 1))):
        one, other = (np.argwhere(volume.label[:, :, k]) for volume in (before, after))
        assert abs(len(one) - len(other)) <= 0.03 * len(one) + 12
        hu = [np.median(volume.hu[:, :, k][volume.label[:, :, k] > 0]) for volume in (before, after)]
        assert abs(hu[0] - hu[1]) <= 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 14), st.floats(0.05, 0.95)), min_size=3, max_size=9), st.integers(0, 99))
def test_a_polygon_holds_the_voxels_whose_centres_it_holds(corners, seed):
    """Matplotlib tells the same of star-shaped polygons, which may reach beyond the grid."""
    rng = np.random.default_rng(seed)
    angles = 2 * np.pi * (np.arange(len(corners)) + [share for _, share in corners]) / len(corners)
    radius = np.array([radius for radius, _ in corners])
    polygon = rng.uniform(2, 14, 2) + radius[:, None] * np.c_[np.cos(angles), np.sin(angles)]
    grid = np.moveaxis(np.indices((16, 12)), 0, -1).reshape(-1, 2)
    expected = matplotlib.path.Path(polygon).contains_points(grid).reshape(16, 12)
    if len(corners) == 3 or np.diff([*angles, angles[0] + 2 * np.pi]).max() < np.pi:  # simple
        np.testing.assert_array_equal(fill([(1, polygon)], (16, 12, 3))[:, :, 1], expected)
        assert not fill([(1, polygon)], (16, 12, 3))[:, :, [0, 2]].any()


def test_roi_names_that_are_not_listed_go_nowhere(change, caplog, capfd, tmp_path):
    """ROI names are free text; a dosimetrist may have put the patient's name there."""

    def name(dataset: pydicom.Dataset) -> None:
        for number, text in ((2, "SMITH^JOHN liver"), (3, "SMITH^JOHN")):
            roi = copy.deepcopy(dataset.StructureSetROISequence[0])
            roi.ROINumber, roi.ROIName = number, text
            dataset.StructureSetROISequence.append(roi)
            drawn = copy.deepcopy(dataset.ROIContourSequence[0])
            drawn.ReferencedROINumber = number
            dataset.ROIContourSequence.append(drawn)

    caplog.set_level(logging.DEBUG)
    folder = change(name)
    source = open_source(folder)
    (folder / "classes.yaml").unlink()
    open_source(folder)
    (folder / "classes.yaml").write_text("liver: {source: SMITH JOHN}")
    with pytest.raises(CaseError) as refused:
        open_source(folder)
    assert "did you mean" not in str(refused.value)
    said = caplog.text + repr(source) + "".join(capfd.readouterr()) + str(refused.value).replace("'smith john'", "")
    assert "smith" not in said.lower()
    assert "there are GTV_Mass_CT, 2 whose names may be a patient's" in caplog.text
    assert "there are GTV_Mass_CT, 2 whose names may be a patient's" in str(refused.value)
    assert "2 ROIs and segments of 1 objects belong to no class" in caplog.text


def test_a_word_of_the_patient_s_name_is_not_told_though_it_is_one_of_anatomy(change, caplog):
    def name(dataset: pydicom.Dataset) -> None:
        dataset.PatientName, dataset.StructureSetROISequence[0].ROIName = "Brain^Joan", "Brain"

    folder = change(name)
    (folder / "classes.yaml").unlink()
    open_source(folder)
    assert "there are 1 whose names may be a patient's" in caplog.text and "Brain" not in caplog.text


def test_a_wrong_name_is_told_which_there_are(series):
    (series / "classes.yaml").write_text("tumour: {source: GTV_Mass}\nignore: 255")
    with pytest.raises(CaseError, match=r"'gtv_mass' is unknown; did you mean 'GTV_Mass_CT'.*there are GTV_Mass_CT"):
        open_source(series)
    (series / "classes.yaml").write_text("tumour: {source: GTV_Mass_CT}\nignore: 255")
    assert open_source(series).problems == ()


def test_a_roi_without_contours_is_not_annotated(change):
    source_without = change(lambda dataset: dataset.ROIContourSequence[0].__delitem__("ContourSequence"))
    with pytest.raises(CaseError, match="structure 'gtv_mass_ct' is unknown; no label has it"):
        open_source(source_without)


def test_two_rois_for_one_part_are_refused(change):
    def twice(dataset: pydicom.Dataset) -> None:
        roi, drawn = map(copy.deepcopy, (dataset.StructureSetROISequence[0], dataset.ROIContourSequence[0]))
        roi.ROINumber, roi.ROIName, drawn.ReferencedROINumber = 2, "GTV_new", 2
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(drawn)

    folder = change(twice)
    (folder / "classes.yaml").write_text("tumour: {source: [[GTV_Mass_CT, GTV_new]]}")
    source = open_source(folder)
    assert source.cases == () and "has 2 structures for one part of tumour" in str(source.problems[0])


def moved(by: float) -> Callable[[pydicom.Dataset], None]:
    def move(dataset: pydicom.Dataset) -> None:
        for contour in contours(dataset):
            set_points(contour, points(contour) + np.array([0, 0, by]))

    return move


def every_other(dataset: pydicom.Dataset) -> None:
    drawn = sorted(contours(dataset), key=lambda contour: points(contour)[0, 2])
    dataset.ROIContourSequence[0].ContourSequence = pydicom.Sequence(drawn[::2])


def opened(dataset: pydicom.Dataset) -> None:
    contours(dataset)[3].ContourGeometricType = "OPEN_PLANAR"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (moved(1.6), "contours lie between the slices, those of tumour"),
        (moved(3.27 * 100), "contours lie outside of the series, those of tumour"),
        (every_other, "contours skip slices, those of tumour"),
        (opened, "contours are open or points, those of tumour"),
        (lambda dataset: contours(dataset)[0].__delattr__("ContourData"), "cannot be read as DICOM"),
    ],
)
def test_contours_that_do_not_fit_are_refused_when_read(change, spoil, says):
    (case,) = open_source(change(spoil)).cases
    with pytest.raises(CaseError, match=rf"RS\.dcm: {says}") as refused:
        read_case(case, TUMOUR)
    assert "\n" not in str(refused.value)


def test_contours_reaching_beyond_a_series_are_cut_off(ct, series):
    files = sorted((series / "ct").iterdir(), key=lambda file: float(pydicom.dcmread(file).ImagePositionPatient[2]))
    for file in files[24:]:
        file.unlink()
    np.testing.assert_array_equal(label_of(series), truth(ct)[:, :, :24])


def other_frame(dataset: pydicom.Dataset) -> None:
    dataset.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = "1.2.3"
    dataset.ReferencedFrameOfReferenceSequence[0].FrameOfReferenceUID = "1.2.3"


def problems_of(folder: Path) -> str:
    return "\n".join(map(str, open_source(folder).problems))


def test_an_rtstruct_of_another_scan_is_a_problem_and_the_scan_is_kept_unlabelled(change):
    folder = change(other_frame)
    assert "RS.dcm: fits 0 of 1 CT series here" in problems_of(folder)
    assert [case.labels for case in open_source(folder).cases] == [()]


def test_contours_drawn_in_another_frame_than_the_series_that_they_reference_are_refused(series, change):
    uid = pydicom.dcmread(next((series / "ct").iterdir())).SeriesInstanceUID

    def reference(dataset: pydicom.Dataset) -> None:
        other_frame(dataset)
        study = dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
        study.RTReferencedSeriesSequence[0].SeriesInstanceUID = uid

    assert "lies in another frame of reference than the series that it references" in problems_of(change(reference))


def test_of_two_series_in_one_frame_the_referenced_one_is_meant(ct, series, change):
    """Two phases of one scan share a frame of reference; without a reference to one of them nobody can tell."""
    shutil.copytree(series / "ct", series / "again", copy_function=shutil.copyfile)
    uid = pydicom.uid.generate_uid()
    for file in (series / "again").iterdir():
        dataset = pydicom.dcmread(file)
        dataset.SeriesInstanceUID = uid
        dataset.save_as(file)
    assert "RS.dcm: fits 2 of 2 CT series here" in problems_of(series)

    def reference(dataset: pydicom.Dataset) -> None:
        study = dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
        study.RTReferencedSeriesSequence[0].SeriesInstanceUID = uid

    source = open_source(change(reference))
    labelled = [case for case in source.cases if case.labels]
    assert len(source.cases) == 2 and len(labelled) == 1 and labelled[0].files[0].parent.name == "again"


def test_two_rtstructs_of_one_series_are_refused_unless_only_one_is_of_use(ct, series):
    shutil.copyfile(series / "rtstruct/RS.dcm", series / "rtstruct/RS2.dcm")
    assert "series of 48 files has 2 RTSTRUCTs or SEGs with listed classes" in problems_of(series)
    assert open_source(series).cases == ()
    dataset = pydicom.dcmread(series / "rtstruct/RS2.dcm")
    dataset.StructureSetROISequence[0].ROIName = "something else"
    dataset.save_as(series / "rtstruct/RS2.dcm")
    np.testing.assert_array_equal(label_of(series), truth(ct))


# --- DICOM-SEG -------------------------------------------------------------------------------------------------


def test_a_segment_lies_on_the_slices_of_its_frames(ct, tmp_path):
    """Each frame of the SEG, read by pydicom, is the label of the slice at its position."""
    folder = copied(ct / "dicom/liver_seg", tmp_path / "liver", "liver: {source: liver}")
    (case,) = open_source(folder).cases
    volume = read_case(case, Catalogue(("liver",)))
    seg = pydicom.dcmread(ct / "dicom/liver_seg/seg/liver.dcm")
    assert seg.NumberOfFrames == 3
    for frame, pixels in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True):
        x, y, z = map(float, frame.PlanePositionSequence[0].ImagePositionPatient)
        i, j, k = np.rint(np.linalg.solve(volume.affine, [-x, -y, z, 1])[:3]).astype(int)
        first_is_last = [slice(None, None, -1 if start else 1) for start in (i, j)]
        np.testing.assert_array_equal(volume.label[:, :, k], pixels.T[tuple(first_is_last)])
    assert 40 < np.median(volume.hu[volume.label == 1]) < 50


def seg_of(folder: Path, mask: np.ndarray, slices: slice, file: Path, **settings) -> Path:
    """A SEG of those slices of the series, as highdicom writes it; `mask` is (slice, row, column) of the whole."""
    files = sorted((folder / "ct").iterdir(), key=lambda file: float(pydicom.dcmread(file).ImagePositionPatient[2]))
    images = [pydicom.dcmread(file) for file in files]
    description = highdicom.seg.SegmentDescription(
        1,
        "Mass of SMITH",
        codes.SCT.MorphologicallyAbnormalStructure,
        codes.SCT.Neoplasm,
        highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
    )
    written = highdicom.seg.Segmentation(
        images[slices],
        mask[slices],
        settings.pop("type", "BINARY"),
        [description],
        pydicom.uid.generate_uid(),
        1,
        pydicom.uid.generate_uid(),
        1,
        "maker",
        "model",
        "1",
        "1",
        **settings,
    )
    written.save_as(file)
    return file


@pytest.fixture
def stack(ct, series) -> np.ndarray:
    """The true mask as (slice, row, column), in a series that has lost its RTSTRUCT."""
    (series / "rtstruct/RS.dcm").unlink()
    (series / "classes.yaml").write_text("tumour: {source: Neoplasm}")
    return truth(ct)[::-1, ::-1].T.astype(np.uint8)


@pytest.mark.parametrize("slices", [slice(None), slice(20, 30), slice(22, 23)])
def test_a_segment_may_cover_some_slices_only(ct, series, stack, slices):
    """By the coded meaning of its property; its free-text label says something else."""
    seg_of(series, stack, slices, series / "seg.dcm")
    expected = np.zeros_like(truth(ct))
    expected[:, :, slices] = truth(ct)[:, :, slices]
    assert expected.any()
    np.testing.assert_array_equal(label_of(series), expected)


def test_a_label_map_seg_is_read_alike(ct, series, stack):
    seg_of(series, stack, slice(None), series / "seg.dcm", type="LABELMAP")
    np.testing.assert_array_equal(label_of(series), truth(ct))


def test_fractions_are_refused(series, stack):
    seg_of(series, stack.astype(float), slice(None), series / "seg.dcm", type="FRACTIONAL")
    (case,) = open_source(series).cases
    with pytest.raises(CaseError, match=r"seg\.dcm: segments are fractions"):
        read_case(case, TUMOUR)


def test_segments_of_every_third_slice_are_refused(series, stack):
    """What lies between them would be learnt as background."""
    seg_of(series, stack, slice(16, 30, 3), series / "seg.dcm")
    (case,) = open_source(series).cases
    with pytest.raises(CaseError, match=r"seg\.dcm: segments lie on another grid"):
        read_case(case, TUMOUR)


def test_segments_on_another_grid_are_refused(series, stack):
    seg_of(series, stack, slice(None), series / "seg.dcm")
    for file in (series / "ct").iterdir():
        dataset = pydicom.dcmread(file)
        dataset.ImagePositionPatient = [float(dataset.ImagePositionPatient[0]) + 0.4, *dataset.ImagePositionPatient[1:]]
        dataset.save_as(file)
    (case,) = open_source(series).cases
    with pytest.raises(CaseError, match=r"seg\.dcm: segments lie on another grid than the series"):
        read_case(case, TUMOUR)


def test_segments_beyond_the_series_are_refused(series, stack):
    seg_of(series, stack, slice(None), series / "seg.dcm")
    files = sorted((series / "ct").iterdir(), key=lambda file: float(pydicom.dcmread(file).ImagePositionPatient[2]))
    for file in files[24:]:
        file.unlink()
    (case,) = open_source(series).cases
    with pytest.raises(CaseError, match=r"seg\.dcm: segments reach beyond the series"):
        read_case(case, TUMOUR)
