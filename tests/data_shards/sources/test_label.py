"""Label files take the catalogue's numbers whatever arithmetic wrote them, and fit their image or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mixcl_dist.data_shards.catalogue import IGNORED, Catalogue, CatalogueError, merged
from mixcl_dist.data_shards.sources import Case, CaseError, open_source, read_case
from mixcl_dist.data_shards.sources.label import read_label
from mixcl_dist.finetuning.task import open_task

from .small_cases import AFFINE, ct_values, nifti_case, organ_values, read, write

SHAPE, GRID = (5, 4, 3), np.diag([2.0, 2.0, 3.0, 1.0])
CLASSES = ("one", "two", "three", "four")
STORED = np.random.default_rng(0).integers(0, 5, SHAPE)


def test_labels_take_the_catalogues_numbers_whatever_their_orientation(tmp_path):
    image = write(tmp_path / "a.nii.gz", ct_values(), AFFINE)
    flipped = AFFINE @ np.array([[-1, 0, 0, 11], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    label = write(tmp_path / "l.nii.gz", organ_values()[::-1].astype(np.float32), flipped)
    volume = read(nifti_case(image, label))  # catalogue: spleen 1, liver 2; both axes flip on the way to RAS
    np.testing.assert_array_equal(volume.label, np.array([0, 2, 1], np.uint8)[organ_values()[::-1, ::-1]])


@pytest.mark.parametrize(
    ("label", "affine", "says"),
    [
        (organ_values()[:-1], AFFINE, "differ in size: 11 x 14 x 10 and 12 x 14 x 10 voxels"),
        (organ_values(), AFFINE + np.diag([0, 0, 0.1, 0]), "label lies 0.9 mm off the image"),
        (organ_values(), AFFINE @ np.diag([-1, 1, 1, 1]), "off the image"),
        (organ_values() * 3, AFFINE, "label holds 3, 6, which has no class name"),
        (organ_values() * 0.5, AFFINE, "label holds 0.5, which"),
        (organ_values().astype(np.int16) * -1, AFFINE, "label holds -2, -1, which"),
        (np.where(organ_values(), np.nan, 0), AFFINE, "NaN"),
    ],
)
def test_a_label_that_does_not_fit_is_refused(tmp_path, label, affine, says):
    image = write(tmp_path / "a.nii.gz", ct_values())
    file = write(tmp_path / "l.nii.gz", label, affine)
    with pytest.raises(CaseError, match=rf"l\.nii\.gz: .*{says}"):
        read(nifti_case(image, file))


def test_a_class_that_the_catalogue_lacks_is_refused(tmp_path):
    image, label = write(tmp_path / "a.nii.gz", ct_values()), write(tmp_path / "l.nii.gz", organ_values())
    with pytest.raises(CaseError, match="class 'liver' is unknown"):
        read_case(nifti_case(image, label), merged([("spleen",)]))


def label_of(path: Path, stored: np.ndarray, affine: np.ndarray = GRID, header=None, **case) -> np.ndarray:
    """What is read of a label file, with values 1 to 4 named."""
    nib.save(nib.Nifti1Image(stored, affine, header), path)
    values = case.pop("values", tuple(enumerate(CLASSES, start=1)))
    found = Case("a", "set", "training", "nifti", (path,), (path,), values, **case)
    return read_label(found, Catalogue(CLASSES), SHAPE, GRID)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_labels_of_any_type_are_read(tmp_path, dtype):
    np.testing.assert_array_equal(label_of(tmp_path / "l.nii", STORED.astype(dtype)), STORED)


def test_what_slope_and_intercept_leave_behind_is_rounded(tmp_path):
    """A float array under an integer header: nibabel chooses a slope, and 3 is read as 3.0000458."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    found = label_of(tmp_path / "l.nii.gz", STORED.astype(float), header=header)
    assert np.any(nib.load(tmp_path / "l.nii.gz").get_fdata() != STORED), "or else this tests nothing"
    np.testing.assert_array_equal(found, STORED)


@settings(max_examples=25)
@given(arrays.arrays(np.float64, SHAPE, elements=st.floats(-0.0099, 0.0099)))
def test_numbers_within_a_hundredth_of_a_whole_one_are_that_one(tmp_path_factory, off):
    path = tmp_path_factory.getbasetemp() / "off.nii"
    np.testing.assert_array_equal(label_of(path, STORED + off), STORED)
    mask = {"values": ((1, "two"),), "label_format": "masks"}
    np.testing.assert_array_equal(label_of(path, (STORED > 2) + off, **mask), 2 * (STORED > 2))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (2.5, "label holds 2.5, which is not whole; write class numbers"),
        (3.02, "label holds 3.02, which is not whole"),
        (7.0, r"label holds 7, which has no class name; .*\(named: 1, 2, 3, 4\)"),
        (-1.0, "label holds -1, which has no class name"),
        (300.0, "label holds 300, which has no class name"),
    ],
)
def test_any_other_number_is_named_with_its_file(tmp_path, value, says):
    stored = STORED.astype(float)
    stored[0, 0, 0] = value
    with pytest.raises(CaseError, match=says) as caught:
        label_of(tmp_path / "label of a.nii", stored)
    assert caught.value.where == tmp_path / "label of a.nii"


def test_values_may_be_larger_than_a_stored_label(tmp_path):
    values = ((1, "one"), (255, "two"), (1035, "three"), (70000, "four"))
    stored = np.array([0, *(value for value, _ in values)])[STORED].astype(np.int32)
    np.testing.assert_array_equal(label_of(tmp_path / "l.nii", stored, values=values), STORED)


def test_a_mask_of_several_values_is_refused_with_them(tmp_path):
    with pytest.raises(CaseError, match=r"holds several values \(0, 1, 2, 3, 4\), so it is no mask"):
        label_of(tmp_path / "m.nii", STORED.astype(np.uint8), values=((1, "two"),), label_format="masks")
    fractions = label_of(tmp_path / "m.nii", (STORED > 1) * 0.5, values=((1, "two"),), label_format="masks")
    np.testing.assert_array_equal(fractions, 2 * (STORED > 1))


def rotated(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]) @ GRID


@pytest.mark.parametrize(
    ("affine", "says"),
    [
        (GRID + np.diag([0, 0, 0.5, 0]), "its spacing is 2 x 2 x 3.5 mm, the image's 2 x 2 x 3"),
        (rotated(10), "its axes are turned by 10.0 degrees"),
        (GRID + np.outer([0, 0, 1, 0], [0, 0, 0, 7.5]), r"its origin is moved by \(\+0.0, \+0.0, \+7.5\) mm"),
    ],
)
def test_what_sets_a_label_off_its_image_is_said(tmp_path, affine, says):
    with pytest.raises(CaseError, match=says):
        label_of(tmp_path / "l.nii", STORED.astype(np.uint8), affine)


def dataset(root: Path, labels) -> Path:
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(STORED.astype(np.uint8), GRID), root / f"{name}.nii")
    entries = [{"image": f"{name}.nii", "label": f"{name}.nii"} for name in ("a", "b")]
    content = {"labels": labels, "training": entries[:1], "validation": entries[1:]}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"0": "liver", "1": "spleen"}, "value 0, which is background, is named 'liver'; give 'liver' another value"),
        ({"liver": 0, "background": 1}, "value 0, which is background, is named 'liver'"),
        ({"0": "airway"}, "is named 'airway'"),
        ({"liver": 1, "spleen": 1}, "value 1 is named 'liver' and 'spleen'; give each value one name"),
        ({"liver": True}, "labels hold 'liver': True"),
        ({"liver": 1.5}, "labels hold 'liver': 1.5"),
        ({"1": ""}, "labels hold '1': ''"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(tmp_path, labels, says):
    with pytest.raises(CaseError, match=says):
        open_source(dataset(tmp_path, labels))


@pytest.mark.parametrize("name", ["background", "_background_", "Clear Label", "BG", "everything else", "not_organ"])
def test_value_0_may_be_called_anything_that_is_no_organ(tmp_path, name):
    assert open_source(dataset(tmp_path, {"0": name, "1": "liver"})).classes == ("liver",)
    assert open_source(dataset(tmp_path, {name: 0.0, "liver": 1.0})).classes == ("liver",)


def test_value_0_may_be_what_nobody_looked_at(tmp_path):
    (case, _) = open_source(dataset(tmp_path, {"ignore": 0, **{name: k for k, name in enumerate(CLASSES, 1)}})).cases
    label = read_label(case, Catalogue(CLASSES), SHAPE, GRID)
    np.testing.assert_array_equal(label, np.where(STORED == 0, IGNORED, STORED))


def test_more_classes_than_a_label_can_hold_are_one_line(tmp_path):
    root = dataset(tmp_path, {str(k): f"organ {k}" for k in range(1, 301)})
    with pytest.raises(CatalogueError, match="300 classes; at most 254 fit"):
        open_task(root)
