"""NRRD and MetaImage files, as they are written by hand, by SimpleITK and beside NIfTI of the same scan."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.sources import Case, CaseError, open_source, read_case
from mixcl_dist.data_shards.sources.itk import itk_files, read_itk
from mixcl_dist.data_shards.sources.voxels import format_of

DIRECTIONS = np.array([[1.5, 0, 0], [0, 0, -2.0], [0, 2.5, 0]])
"""Row n is the step in mm from one voxel to the next along axis n."""
ORIGIN = np.array([10.0, 20.0, -30.0])
TO_RAS = {
    "left-posterior-superior": (-1, -1, 1),
    "LPS": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1),
    "RAS": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
}


def ct_values(shape=(12, 14, 10)) -> np.ndarray:
    hu = np.full(shape, -1000.0)
    hu[2:-2, 2:-2] = 40
    return np.rint(hu + np.random.default_rng(0).normal(0, 15, shape)).astype("<i2")


def nrrd(path: Path, hu: np.ndarray, space: str | None = "LPS", data: bytes | None = None, **fields: str) -> Path:
    """Written by hand from the format's description; the first axis is the fastest."""
    steps = " ".join("({})".format(",".join(f"{x:g}" for x in row)) for row in DIRECTIONS)
    header = {
        "type": "short",
        "dimension": "3",
        "space": space,
        "sizes": " ".join(map(str, hu.shape)),
        "space directions": steps,
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "raw",
        "space origin": "({:g},{:g},{:g})".format(*ORIGIN),
    } | {key.replace("_", " "): value for key, value in fields.items()}
    lines = ["NRRD0004", *(f"{key}: {value}" for key, value in header.items() if value is not None), "", ""]
    path.write_bytes("\n".join(lines).encode() + (hu.tobytes(order="F") if data is None else data))
    return path


def metaimage(path: Path, hu: np.ndarray, data: bytes | None = None, drop: str = "", **fields: str) -> Path:
    header = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": " ".join(f"{x:g}" for row in DIRECTIONS for x in row / np.linalg.norm(row)),
        "Offset": "{:g} {:g} {:g}".format(*ORIGIN),
        "ElementSpacing": " ".join(f"{np.linalg.norm(row):g}" for row in DIRECTIONS),
        "DimSize": " ".join(map(str, hu.shape)),
        "ElementType": "MET_SHORT",
    } | fields
    header |= {"ElementDataFile": header.get("ElementDataFile", "LOCAL")}
    lines = [f"{key} = {value}" for key, value in header.items() if key != drop]
    path.write_bytes("\n".join([*lines, ""]).encode() + (hu.tobytes(order="F") if data is None else data))
    return path


def affine_in(space: str) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = DIRECTIONS.T, ORIGIN
    return np.diag([*TO_RAS[space], 1.0]) @ affine


@pytest.mark.parametrize("space", TO_RAS)
def test_an_nrrd_lies_where_its_space_says(tmp_path, space):
    hu = ct_values()
    voxels, affine = read_itk(nrrd(tmp_path / "a.nrrd", hu, space))
    np.testing.assert_array_equal(voxels, hu)
    np.testing.assert_allclose(affine, affine_in(space), atol=1e-9)


def test_a_metaimage_is_in_lps(tmp_path):
    voxels, affine = read_itk(metaimage(tmp_path / "a.mha", ct_values()))
    np.testing.assert_array_equal(voxels, ct_values())
    np.testing.assert_allclose(affine, affine_in("LPS"), atol=1e-9)


@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("packed", [False, True])
def test_real_scans_are_those_of_their_nifti_whatever_they_are_written_as(ct, tmp_path, ending, packed):
    """Written by SimpleITK from NIfTI, which on our side nibabel reads."""
    for name in ("images/totalseg_aorta", "images/ibsi_lung"):
        original = ct / "torso" / f"{name}.nii.gz"
        copy = tmp_path / f"{original.name.split('.')[0]}{ending}"
        sitk.WriteImage(sitk.ReadImage(str(original)), str(copy), packed)
        before = read_case(Case("a", "d", "unlabelled", "nifti", (original,)), Catalogue(()))
        after = read_case(Case("a", "d", "unlabelled", format_of(copy), itk_files(copy)), Catalogue(()))
        np.testing.assert_array_equal(after.hu, before.hu)
        np.testing.assert_allclose(after.affine, before.affine, atol=1e-4)


def test_lists_and_nnunet_take_them_as_images_and_labels(tmp_path):
    organ = (ct_values() > -500).astype("<i2")
    nrrd(tmp_path / "a.nrrd", ct_values())
    metaimage(tmp_path / "a_label.mhd", organ, b"", ElementDataFile="a_label.raw")
    (tmp_path / "a_label.raw").write_bytes(organ.tobytes(order="F"))
    entry = {"image": "a.nrrd", "label": "a_label.mhd"}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"1": "body"}, "training": [entry]}))
    (case,) = open_source(tmp_path).cases
    assert [file.name for file in case.inputs] == ["a.nrrd", "a_label.mhd", "a_label.raw"]
    volume = read_case(case, Catalogue(("body",)))
    np.testing.assert_array_equal(volume.label, volume.hu > -500)

    for part, name, array in (("imagesTr", "a_0000", ct_values()), ("labelsTr", "a", organ)):
        (tmp_path / "nn" / part).mkdir(parents=True)
        nrrd(tmp_path / "nn" / part / f"{name}.nrrd", array)
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "body": 1}, "file_ending": ".nrrd"}
    (tmp_path / "nn/dataset.json").write_text(json.dumps(content))
    (case,) = open_source(tmp_path / "nn").cases
    np.testing.assert_array_equal(read_case(case, Catalogue(("body",))).label, volume.label)


def test_a_label_may_be_of_another_format_than_its_image(ct, tmp_path):
    """A NIfTI image with its label as NRRD, in another orientation."""
    source = open_source(ct / "torso")
    case = next(case for case in source.cases if case.name == "totalseg_aorta")
    label = sitk.DICOMOrient(sitk.ReadImage(str(case.labels[0])), "PSR")
    sitk.WriteImage(label, str(tmp_path / "label.nrrd"))
    other = Case("a", "d", "training", "nifti", case.files, (tmp_path / "label.nrrd",), case.label_values)
    catalogue = Catalogue(source.classes)
    np.testing.assert_array_equal(read_case(other, catalogue).label, read_case(case, catalogue).label)


def test_a_folder_of_them_is_a_source_and_detached_data_belong_to_their_header(tmp_path):
    nrrd(tmp_path / "a.nrrd", ct_values())
    nrrd(tmp_path / "b.nhdr", ct_values(), data=b"", data_file="b.raw")
    (tmp_path / "b.raw").write_bytes(ct_values().tobytes(order="F"))
    source = open_source(tmp_path)
    assert source.problems == ()
    assert [[file.name for file in case.files] for case in source.cases] == [["a.nrrd"], ["b.nhdr", "b.raw"]]
    one, other = (read_case(case, Catalogue(())) for case in source.cases)
    np.testing.assert_array_equal(one.hu, other.hu)


@pytest.mark.parametrize("space", [None, "scanner-xyz", "3D-right-handed", "left-posterior-superior-time"])
def test_an_nrrd_that_does_not_say_which_side_is_left_is_refused(tmp_path, space):
    """SimpleITK would take all of them for LPS."""
    with pytest.raises(CaseError, match=r"a\.nrrd: the header does not say which side is left"):
        read_itk(nrrd(tmp_path / "a.nrrd", ct_values(), space))


@pytest.mark.parametrize("field", ["space_directions", "space_origin"])
def test_an_nrrd_without_a_place_is_refused(tmp_path, field):
    with pytest.raises(CaseError, match="where the voxels lie"):
        read_itk(nrrd(tmp_path / "a.nrrd", ct_values(), **{field: None}))


@pytest.mark.parametrize("field", ["TransformMatrix", "Offset", "ElementSpacing"])
def test_a_metaimage_without_a_place_is_refused(tmp_path, field):
    with pytest.raises(CaseError, match=r"a\.mha: the header does not say"):
        read_itk(metaimage(tmp_path / "a.mha", ct_values(), drop=field))


@pytest.mark.parametrize(("unit", "mm"), [("mm", 1.0), ("cm", 10.0)])
def test_an_nrrds_lengths_are_in_its_space_units(tmp_path, unit, mm):
    path = nrrd(tmp_path / "a.nrrd", ct_values(), "RAS")
    units = " ".join([f'"{unit}"'] * 3).encode()
    path.write_bytes(path.read_bytes().replace(b"sizes:", b"space units: " + units + b"\nsizes:"))
    np.testing.assert_allclose(read_itk(path)[1][:3], mm * affine_in("RAS")[:3], atol=1e-9)


def test_an_nrrd_of_an_unknown_unit_is_refused(tmp_path):
    path = nrrd(tmp_path / "a.nrrd", ct_values(), "RAS")
    path.write_bytes(path.read_bytes().replace(b"sizes:", b'space units: "inch" "inch" "inch"\nsizes:'))
    with pytest.raises(CaseError, match="lengths in several units, or in one that is unknown"):
        read_itk(path)


def test_a_key_of_the_writers_own_is_no_field(tmp_path):
    """In NRRD `key:=value` is free text."""
    path = nrrd(tmp_path / "a.nrrd", ct_values(), "LPS")
    path.write_bytes(path.read_bytes().replace(b"sizes:", b"data file:=SMITH\nspace:=RAS\nsizes:"))
    np.testing.assert_allclose(read_itk(path)[1], affine_in("LPS"), atol=1e-9)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 4]) + content[len(content) // 2 + 1 :]


RAW = ct_values().tobytes(order="F")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: nrrd(path / "a.nrrd", ct_values(), data=cut(RAW)),
        lambda path: nrrd(path / "a.nrrd", ct_values(), data=cut(gzip.compress(RAW)), encoding="gzip"),
        # stored rather than deflated, so that nothing but the checksum can tell
        lambda path: nrrd(path / "a.nrrd", ct_values(), data=flipped(gzip.compress(RAW, 0)), encoding="gzip"),
        lambda path: metaimage(path / "a.mha", ct_values(), data=cut(RAW)),
        lambda path: metaimage(path / "a.mha", ct_values(), data=cut(zlib.compress(RAW)), CompressedData="True"),
        # SimpleITK returns these without an error
        lambda path: metaimage(path / "a.mha", ct_values(), data=flipped(zlib.compress(RAW, 0)), CompressedData="True"),
        lambda path: metaimage(path / "a.mha", ct_values(), data=flipped(zlib.compress(RAW)), CompressedData="True"),
        lambda path: metaimage(path / "a.mha", ct_values(), data=zlib.compress(cut(RAW)), CompressedData="True"),
        lambda path: nrrd(path / "a.nrrd", ct_values(), sizes="12 14 99999999999"),
        lambda path: nrrd(path / "a.nrrd", ct_values(), type="SMITH^JOHN"),
    ],
)
def test_a_broken_file_is_refused_in_one_line_that_quotes_nothing(tmp_path, write, capfd):
    path = write(tmp_path)
    with pytest.raises(CaseError, match=rf"{path}: cannot be read as \.\w+: .*; copy or download it again") as refused:
        read_itk(path)
    assert "SMITH" not in str(refused.value) and "\n" not in str(refused.value)
    assert "SMITH" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("content", [b"", b"no scan", b"NRRD", b"\xff" * 5000, b"NRRD0004\n" + b"x" * 3_000_000])
@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_what_is_no_such_file_is_refused(tmp_path, content, ending):
    (tmp_path / f"a{ending}").write_bytes(content)
    with pytest.raises(CaseError, match=rf"a{ending}: cannot be read as {ending}"):
        read_itk(tmp_path / f"a{ending}")
    source = open_source(tmp_path)
    assert source.cases == () and len(source.problems) == 1


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: nrrd(path / "a.nhdr", ct_values(), data=b"", data_file="gone.raw"), "its voxels is missing"),
        (lambda path: nrrd(path / "a.nhdr", ct_values(), data=b"", data_file="LIST"), "lie in several files"),
        (lambda path: nrrd(path / "a.nhdr", ct_values(), data=b"", data_file="%03d.raw 1 9 1"), "in several files"),
        (lambda path: metaimage(path / "a.mhd", ct_values(), ElementDataFile="LIST"), "in several files"),
        (lambda path: metaimage(path / "a.mhd", ct_values(), ElementDataFile="gone.zraw"), "its voxels is missing"),
    ],
)
def test_voxels_that_are_elsewhere_are_found_when_the_source_is_opened(tmp_path, write, says):
    write(tmp_path)
    source = open_source(tmp_path)
    assert source.cases == () and says in str(source.problems[0])


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (lambda path: nrrd(path / "a.nrrd", ct_values()[..., :1]), "12 x 14 x 1 voxels"),
        (
            lambda path: nrrd(
                path / "a.nrrd",
                np.stack([ct_values()] * 2),
                dimension="4",
                kinds="vector domain domain domain",
                space_directions="none (2,0,0) (0,2,0) (0,0,2)",
            ),
            "12 x 14 x 10 voxels of 2 values",
        ),
        (lambda path: metaimage(path / "a.mha", ct_values(), TransformMatrix="1 0 0 0 1 0 0 0.3 0.95"), "sheared"),
        (lambda path: metaimage(path / "a.mha", ct_values(), ElementSpacing="1 1 90"), "1 x 1 x 90 mm is impossible"),
    ],
)
def test_what_is_no_volume_is_refused(tmp_path, path, says):
    with pytest.raises(CaseError, match=says):
        read_itk(path(tmp_path))


def test_nan_is_refused(tmp_path):
    hu = ct_values().astype("<f4")
    hu[3, 3, 3] = np.nan
    with pytest.raises(CaseError, match="1 voxels are NaN"):
        read_itk(nrrd(tmp_path / "a.nrrd", hu, type="float"))


def test_masks_of_slicer_and_itk_are_no_ct(ct, tmp_path):
    nib_label = sorted((ct / "torso/labels").iterdir())[0]
    sitk.WriteImage(sitk.ReadImage(str(nib_label)), str(tmp_path / "a.seg.nrrd"))
    (case,) = open_source(tmp_path).cases
    with pytest.raises(CaseError, match=r"a mask|no air or fat"):
        read_case(case, Catalogue(()))
    assert nib.load(nib_label).shape == sitk.ReadImage(str(case.files[0])).GetSize()
