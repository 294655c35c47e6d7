"""DICOM series become cases under a pseudonym; what does not stack to a CT volume is refused from its
headers."""

from __future__ import annotations

import hashlib
import io
import logging
import re
import shutil
import stat
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import JPEG2000MC, MPEG2MPML

from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.sources import Case, CaseError, open_source, read_case

NO_CLASSES = Catalogue(())


@pytest.fixture(autouse=True)
def pseudonym_key(monkeypatch):
    monkeypatch.setenv("MIXCL_PSEUDONYM_KEY", "key of the tests")


@pytest.fixture
def series(ct, tmp_path) -> Path:
    """A copy of the 48 slices of a real series, to be spoilt."""
    folder = tmp_path / "series"
    shutil.copytree(ct / "sarcoma/STS_002/dicom/ct", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


def by_height(folder: Path) -> list[Path]:
    def height(file: Path) -> float:
        return float(pydicom.dcmread(file, stop_before_pixels=True).ImagePositionPatient[2])

    return sorted(folder.iterdir(), key=height)


def change(file: Path, **values) -> None:
    dataset = pydicom.dcmread(file)
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.save_as(file)


def tilt(folder: Path, degrees: float) -> None:
    """Turn the planes of a series about its rows, and leave their origins where they are."""
    turned = [1, 0, 0, 0, np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]
    for file in folder.iterdir():
        change(file, ImageOrientationPatient=[f"{value:.8f}" for value in turned])


def only_case(folder: Path) -> Case:
    source = open_source(folder)
    assert source.problems == ()
    (case,) = source.cases
    return case


def only_problem(folder: Path) -> CaseError:
    source = open_source(folder)
    assert source.cases == ()
    (problem,) = source.problems
    return problem


# --- real series -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["STS_001", "STS_002"])
def test_a_series_is_its_nifti_voxel_for_voxel(ct, case):
    source = open_source(ct / "sarcoma" / case)
    (dicom,) = [case for case in source.cases if case.format == "dicom"]
    (nifti,) = [case for case in source.cases if case.files[0].name == "image.nii.gz"]
    one, other = read_case(dicom, NO_CLASSES), read_case(nifti, NO_CLASSES)
    np.testing.assert_array_equal(one.hu, other.hu)
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-3)


@pytest.mark.parametrize("folder", ["dicom/totalseg_j2k/ct", "dicom/liver_seg", "sarcoma/STS_001/dicom"])
def test_slices_lie_where_simpleitk_sees_them(ct, folder):
    """Each file on its own, so that nothing depends on how slices were ordered."""
    case = only_case(ct / folder)
    volume = read_case(case, NO_CLASSES)
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    rng = np.random.default_rng(0)
    for file in case.files:
        image = sitk.ReadImage(str(file))
        for column, row in rng.integers(0, image.GetSize()[:2], (50, 2)).tolist():
            x, y, z = image.TransformIndexToPhysicalPoint((column, row, 0))
            found = np.linalg.solve(volume.affine, [-x, -y, z, 1])[:3]
            voxel = tuple(np.rint(found).astype(int))
            np.testing.assert_allclose(found, voxel, atol=1e-2)
            assert volume.hu[voxel] == max(-1024, image[column, row, 0])


def test_distance_of_slices_is_not_their_thickness(ct):
    case = only_case(ct / "dicom/totalseg_j2k/ct")
    assert pydicom.dcmread(case.files[0], stop_before_pixels=True).SliceThickness == 3
    assert read_case(case, NO_CLASSES).spacing == pytest.approx((0.9765625, 0.9765625, 2.0))


def test_labels_on_the_same_grid_fall_on_their_organs(ct):
    """The label file is stored in another orientation than the series."""
    scan = only_case(ct / "dicom/totalseg_j2k/ct")
    label = ct / "dicom/totalseg_j2k/labels.nii.gz"
    values = tuple((int(v), f"organ {v:g}") for v in np.unique(np.asanyarray(nib.load(label).dataobj)) if v)
    case = Case(scan.name, "set", "training", "dicom", scan.files, (label,), values)
    volume = read_case(case, Catalogue(tuple(name for _, name in values)))
    liver = volume.hu[volume.label == [v for v, _ in values].index(5) + 1]
    assert liver.size > 10_000 and 80 < np.median(liver) < 110


def test_outside_of_the_field_of_view_is_air(ct):
    case = only_case(ct / "dicom/liver_seg")
    stored = pydicom.dcmread(case.files[0])
    assert stored.pixel_array.min() == stored.PixelPaddingValue == -2000
    hu = read_case(case, NO_CLASSES).hu
    assert hu.min() == -1024 and hu[0, 0, 0] == -1024


def test_good_series_are_kept_and_each_other_is_one_problem(ct):
    source = open_source(ct / "dicom")
    assert len(source.cases) == 4  # liver_seg, totalseg_j2k and its label file, the CT in mixed_series
    assert sorted(len(case.files) for case in source.cases) == [1, 3, 4, 20]
    said = {problem.where.parent.name + ": " + problem.what for problem in source.problems}
    assert said == {
        "mixed_series: series of 16 file(s) is PT, not CT",
        "mixed_series: series of 1 file(s) has a single slice",
        "qa_ge_head: series of 28 file(s) has uneven gaps between slices, from 1.08 to 7.00 mm",
    }


def test_companions_of_a_scan_are_no_problem(ct):
    only_case(ct / "dicom/liver_seg")  # with a SEG
    only_case(ct / "sarcoma/STS_001/dicom")  # with an RTSTRUCT


def test_series_without_uid_are_told_apart_by_folder_and_geometry(ct, tmp_path):
    for part in ("one", "two"):
        shutil.copytree(ct / "dicom/totalseg_j2k/ct", tmp_path / part, copy_function=shutil.copyfile)
    for file in sorted((tmp_path / "two").iterdir()):
        dataset = pydicom.dcmread(file)
        dataset.ImagePositionPatient = [*dataset.ImagePositionPatient[:2], dataset.ImagePositionPatient[2] + 1]
        dataset.save_as(file)
    source = open_source(tmp_path)
    assert source.problems == () and [len(case.files) for case in source.cases] == [20, 20]


# --- tilted gantry ---------------------------------------------------------------------------------------------


def at(image: sitk.Image, affine: np.ndarray, index: np.ndarray) -> np.ndarray:
    """SimpleITK's linear interpolation in one slice, where the voxels `index` (n, 3) of `affine` lie; NaN outside."""
    values = []
    for voxel in index:
        x, y, z, _ = affine @ [*voxel, 1.0]
        column, row, off = image.TransformPhysicalPointToContinuousIndex((-x, -y, z))
        inside = 0 <= column <= image.GetWidth() - 1 and 0 <= row <= image.GetHeight() - 1
        point = image.TransformContinuousIndexToPhysicalPoint((column, row, 0.0))
        assert abs(off) * image.GetSpacing()[2] < 1e-2, "each slice stays in its plane"
        values.append(image.EvaluateAtPhysicalPoint(point) if inside else np.nan)
    return np.array(values)


@pytest.mark.parametrize("part", [slice(0, 14), slice(14, 28)])
def test_a_tilted_head_lies_where_simpleitk_sees_each_slice(ct, tmp_path, part):
    """The real series changes its slice distance in the middle; either part is even, and tilted by 18.5 degrees."""
    for file in by_height(ct / "dicom/qa_ge_head")[part]:
        shutil.copyfile(file, tmp_path / file.name)
    case = only_case(tmp_path)
    volume = read_case(case, NO_CLASSES)
    assert volume.spacing == pytest.approx((0.488, 0.488, 4.0 if part.start == 0 else 7.0), abs=0.02)
    cosines = volume.affine[:3, :3] / volume.spacing
    np.testing.assert_allclose(cosines.T @ cosines, np.eye(3), atol=1e-4)
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert np.degrees(np.arccos(cosines[2, 2])) == pytest.approx(18.5, abs=0.1), "it stays oblique"
    rng, compared = np.random.default_rng(0), 0
    for k, file in enumerate(case.files):
        image = sitk.Cast(sitk.ReadImage(str(file)), sitk.sitkFloat64)
        index = np.c_[rng.integers(0, volume.hu.shape[:2], (300, 2)), np.full(300, k)]
        expected = at(image, volume.affine, index)
        seen = ~np.isnan(expected) & (expected > -1000)  # padding of -1500 is air, so mixtures with it differ
        assert (volume.hu[tuple(index[np.isnan(expected)].T)] == -1024).all()
        found = volume.hu[tuple(index[seen].T)]
        near_padding = np.abs(found - expected[seen]) > 0.51
        assert near_padding.mean() < 0.02
        compared += np.count_nonzero(seen)
    assert compared > 1000


@pytest.mark.parametrize("degrees", [-20, 12.5])
def test_a_tilted_series_is_a_function_of_position(series, degrees):
    """HU that grow linearly over the patient do so on the right-angled grid, whichever way the gantry leans."""
    tilt(series, degrees)
    slope = np.array([0.5, -1.0, 2.0])
    middle = np.add(pydicom.dcmread(by_height(series)[24]).ImagePositionPatient, [80.0, 70.0, 0.0])

    def ramp(lps):
        return (lps - middle) @ slope

    for file in by_height(series):
        dataset = pydicom.dcmread(file)
        rows, columns = np.indices(dataset.pixel_array.shape)
        column_step = np.array(dataset.ImageOrientationPatient[:3], float) * float(dataset.PixelSpacing[1])
        row_step = np.array(dataset.ImageOrientationPatient[3:], float) * float(dataset.PixelSpacing[0])
        place = np.array(dataset.ImagePositionPatient, float)
        place = place + columns[..., None] * column_step + rows[..., None] * row_step
        dataset.PixelData = np.rint(ramp(place) - float(dataset.RescaleIntercept)).astype("<i2").tobytes()
        dataset.save_as(file)
    volume = read_case(only_case(series), NO_CLASSES)
    inside = np.argwhere(volume.hu != -1024)
    lps = (inside @ volume.affine[:3, :3].T + volume.affine[:3, 3]) * [-1, -1, 1]
    off = np.abs(volume.hu[tuple(inside.T)] - ramp(lps))
    assert np.mean(off < 1.1) > 0.97 and inside.size / 3 > 0.95 * 161 * 143 * 48, "but for the rows at the edge"


# --- spoilt series ---------------------------------------------------------------------------------------------


def test_order_comes_from_position_whatever_files_and_instances_are_called(series):
    before = read_case(only_case(series), NO_CLASSES)
    for number, file in enumerate(sorted(series.iterdir())):
        change(file, InstanceNumber=number * 7 % 48)
        file.rename(series / f"{hashlib.sha256(file.name.encode()).hexdigest()}.dcm")
    after = read_case(only_case(series), NO_CLASSES)
    np.testing.assert_array_equal(after.hu, before.hu)
    np.testing.assert_array_equal(after.affine, before.affine)


def test_a_missing_slice_is_refused(series):
    by_height(series)[20].unlink()
    assert "uneven gaps between slices, from 3.27 to 6.54 mm" in str(only_problem(series))


def test_a_single_slice_put_off_is_refused_but_rounding_is_not(series):
    file = by_height(series)[20]
    x, y, z = pydicom.dcmread(file, stop_before_pixels=True).ImagePositionPatient
    change(file, ImagePositionPatient=[x, y, z + 0.05])
    only_case(series)
    change(file, ImagePositionPatient=[x, y, z + 0.5])
    assert "uneven gaps" in str(only_problem(series))
    change(file, ImagePositionPatient=[x + 2, y, z])
    assert "uneven gaps" in str(only_problem(series))


def test_a_slice_twice_is_refused(series):
    shutil.copyfile(by_height(series)[20], series / "again.dcm")
    assert "has 1 slices where another one lies" in str(only_problem(series))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"PixelSpacing": [0.5, 0.5]}, "mixes image sizes, orientations or pixel spacings"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "mixes"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "holds a localizer"),
        ({"ImagePositionPatient": None}, "no positions"),
        ({"NumberOfFrames": 12}, "has multi-frame images; convert it to NIfTI, e.g. with dcm2niix"),
        ({"SamplesPerPixel": 3}, "has colour images; leave it out"),
        ({"Modality": "MR"}, "is MR, not CT"),
        ({"Modality": ""}, "is unknown, not CT"),
    ],
)
def test_one_odd_slice_spoils_the_series(series, values, says):
    change(by_height(series)[20], **values)
    assert says in str(only_problem(series))


def test_a_tilt_within_half_a_degree_changes_no_voxel(series):
    before = read_case(only_case(series), NO_CLASSES).hu
    tilt(series, 0.4)
    np.testing.assert_array_equal(read_case(only_case(series), NO_CLASSES).hu, before)
    tilt(series, 0.6)
    assert read_case(only_case(series), NO_CLASSES).hu.shape != before.shape


def test_a_truncated_slice_is_quarantined_when_read(series):
    case = only_case(series)
    case.files[5].write_bytes(case.files[5].read_bytes()[:-1000])
    with pytest.raises(CaseError, match=rf"{case.files[5].name}: cannot be read as DICOM"):
        read_case(case, NO_CLASSES)


@pytest.mark.parametrize(
    ("syntax", "says"),
    [
        (JPEG2000MC, "JPEG 2000 Part 2 Multi-component Image Compression (transfer syntax 1.2.840.10008.1.2.4.93)"),
        (MPEG2MPML, "MPEG2 Main Profile / Main Level (transfer syntax 1.2.840.10008.1.2.4.100)"),
        ("1.2.840.113619.5.2", "packed as a private transfer syntax, which is not read"),
    ],
)
def test_voxels_that_are_packed_in_a_way_that_is_not_read_say_which(series, syntax, says):
    case = only_case(series)
    for file in case.files:
        dataset = pydicom.dcmread(file)
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([b"\xff\xd8 whatever \xff\xd9"])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        pydicom.dcmwrite(file, dataset, implicit_vr=False, little_endian=True, overwrite=True)
    with pytest.raises(CaseError) as refused:
        read_case(case, NO_CLASSES)
    assert says in str(refused.value) and "unpack it first" in refused.value.cure


@pytest.mark.parametrize("whole", [True, False])
def test_a_sound_jpeg_of_a_process_that_is_not_decoded_is_not_called_broken(series, whole):
    """12 bits a pixel in a scan whose last coefficient is not said: valid, and refused by libjpeg."""
    jpeg = pydicom.dcmread(get_testdata_file("JPEG-lossy.dcm", download=False))
    frame = get_frame(jpeg.PixelData, 0)
    case = only_case(series)
    for file in case.files:
        dataset = pydicom.dcmread(file)
        dataset.file_meta.TransferSyntaxUID = jpeg.file_meta.TransferSyntaxUID
        dataset.PixelData = encapsulate([frame if whole else frame[: len(frame) // 2]])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(file)
    with pytest.raises(CaseError) as refused:
        read_case(case, NO_CLASSES)
    named = "JPEG Extended (Process 2 and 4) (transfer syntax 1.2.840.10008.1.2.4.51), in a process" in str(
        refused.value
    )
    assert named == whole and ("cannot be read as DICOM" in str(refused.value)) != whole


def test_an_image_without_voxels_says_so(series):
    case = only_case(series)
    dataset = pydicom.dcmread(case.files[3])
    del dataset.PixelData
    dataset.save_as(case.files[3])
    with pytest.raises(CaseError, match="is a DICOM image without voxels"):
        read_case(case, NO_CLASSES)


def test_what_calls_itself_dicom_and_is_not_is_a_problem_and_other_files_are_none(series):
    (series / "notes.txt").write_text("no scan")
    (series / "broken.dcm").write_bytes(b"\0" * 1000)
    source = open_source(series)
    assert len(source.cases) == 1
    (problem,) = source.problems
    assert str(problem).startswith(f"{series}/broken.dcm: cannot be read as DICOM")


def test_pixels_may_be_longer_than_wide(series):
    for file in series.iterdir():
        change(file, PixelSpacing=[2, 0.5])
    case = only_case(series)
    assert sitk.ReadImage(str(case.files[0])).GetSpacing()[:2] == (0.5, 2.0)
    assert read_case(case, NO_CLASSES).spacing == pytest.approx((0.5, 2.0, 3.27))


def test_rescaling_and_padding(series):
    files = by_height(series)
    before = read_case(only_case(series), NO_CLASSES).hu
    for file in files:
        dataset = pydicom.dcmread(file)
        stored = ((dataset.pixel_array.astype(int) + 1000) * 2).astype("<i2")
        stored[:5] = 5000  # a bright value, were it not marked as padding
        dataset.PixelData = stored.tobytes()
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5, -1000
        dataset.add_new("PixelPaddingValue", "SS", 5000)
        dataset.save_as(file)
    after = read_case(only_case(series), NO_CLASSES).hu
    np.testing.assert_array_equal(after[:, :-5], before[:, :-5])  # rows run to the back, RAS to the front
    assert (after[:, -5:] == -1024).all()


def test_each_slice_has_its_own_rescaling(series):
    before = read_case(only_case(series), NO_CLASSES).hu
    for number, file in enumerate(by_height(series)):
        dataset = pydicom.dcmread(file)
        slope = (0.5, 0.25, 1.0)[number % 3]
        hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        dataset.PixelData = np.rint((hu + 100 * number) / slope).astype("<i2").tobytes()
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, -100 * number
        dataset.save_as(file)
    np.testing.assert_array_equal(read_case(only_case(series), NO_CLASSES).hu, before)


# --- pseudonyms ------------------------------------------------------------------------------------------------


def identifiers(folder: Path) -> set[str]:
    """All that could tell who it is: names, numbers, UIDs, dates and file names of every DICOM file below."""
    found = set()
    for file in folder.rglob("*"):
        if file.is_file() and pydicom.misc.is_dicom(file):
            found |= {file.name, file.stem}
            for element in pydicom.dcmread(file, stop_before_pixels=True):
                if element.VR in ("PN", "UI", "DA", "TM", "LO", "SH", "DT", "AE") or element.keyword == "PatientID":
                    found |= {str(element.value)}
    return {text for text in found if len(text) > 4}


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_no_identifier_leaves_the_reader(ct):
    for folder in (ct / "dicom", ct / "sarcoma/STS_001/dicom", ct / "sarcoma/STS_002/dicom"):
        source = open_source(folder)
        secrets = identifiers(folder)
        assert len(secrets) > 50
        dicom = [case for case in source.cases if case.format == "dicom"]
        said = [text for case in dicom for text in (case.name, case.dataset)]
        said += [text for problem in source.problems for text in (problem.what, problem.cure)]
        assert dicom and not [(text, secret) for text in said for secret in secrets if secret in text]
        assert all(re.fullmatch(r"ct-[0-9a-f]{16}", case.name) for case in dicom)


def test_a_broken_header_is_not_quoted(series, capfd, recwarn):
    """pydicom quotes values that it cannot parse, in warnings and in its log."""
    first = by_height(series)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(first, StudyDate="SMITH^JOHN", SeriesInstanceUID="SMITH^JOHN", PixelSpacing=[1, 1])
        second = series / "other.dcm"
        shutil.copyfile(first, second)
        change(second, ImagePositionPatient=[0, 0, 0])
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    source = open_source(series)
    said = [str(problem) for problem in source.problems] + [case.name for case in source.cases]
    for case in source.cases:
        read_case(case, NO_CLASSES)
    logging.getLogger().removeHandler(handler)
    said += [str(warning.message) for warning in recwarn] + [log.getvalue(), *capfd.readouterr()]
    assert len(source.problems) == 1 and "SMITH" not in "".join(said)


def test_pseudonyms_depend_on_series_and_key_alone(ct, series, monkeypatch):
    here = only_case(ct / "sarcoma/STS_002/dicom").name
    assert only_case(series).name == here
    monkeypatch.setenv("MIXCL_PSEUDONYM_KEY", "another key")
    assert only_case(series).name != here


def test_without_a_key_one_is_made_once_for_its_owner_alone(series, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("MIXCL_PSEUDONYM_KEY")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    first, second = only_case(series).name, only_case(series).name
    assert first == second
    (key,) = (tmp_path / "home/.config/mixcl").iterdir()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and len(key.read_bytes()) == 64
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(key) in line and key.read_text() not in line
