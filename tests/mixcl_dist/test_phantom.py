"""The phantom cohort: organs where and as dense as in people, and data sets that annotate different classes."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from mixcl_dist.data_shards.sources import open_source
from mixcl_dist.phantom import CLASSES, draw_torso, write_cohort

SIZE, SPACING_MM = (72, 60, 72), 5.0


@pytest.fixture(scope="module")
def patients():
    return [draw_torso(SIZE, SPACING_MM, np.random.default_rng(seed)) for seed in range(6)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    sources = write_cohort(folder, training=4, validation=1, unlabelled=1, seed=3)
    return folder, sources


def centre_mm(label, name):
    return np.argwhere(label == CLASSES.index(name) + 1).mean(axis=0) * SPACING_MM


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("liver", 60, 130),
        ("spleen", 100, 170),
        ("kidneys", 110, 230),
        ("aorta", 120, 310),
        ("vertebrae", 200, 600),
    ],
)
def test_organs_have_the_hu_of_ct(patients, name, low, high):
    for hu, label in patients:
        assert low < np.median(hu[label == CLASSES.index(name) + 1]) < high


def test_organs_have_the_volume_of_adults(patients):
    litres = SPACING_MM**3 / 1e6
    for _, label in patients:
        assert 0.7 < np.count_nonzero(label == CLASSES.index("liver") + 1) * litres < 2.5
        assert 0.1 < np.count_nonzero(label == CLASSES.index("kidneys") + 1) * litres < 0.6


@pytest.mark.parametrize("name", CLASSES)
def test_organs_are_wide_enough_to_be_learnt_in_minutes(patients, name):
    for _, label in patients:
        depth_mm = ndimage.distance_transform_edt(label == CLASSES.index(name) + 1, sampling=SPACING_MM).max()
        assert 2 * depth_mm > 20  # at its widest


def test_organs_stand_out_from_what_surrounds_them(patients):
    for hu, label in patients:
        for k in range(1, len(CLASSES) + 1):
            shell = ndimage.binary_dilation(label == k, iterations=2) & (label == 0)
            assert abs(np.median(hu[label == k]) - np.median(hu[shell])) > 40


def test_sides_are_the_patients(patients):
    for _, label in patients:
        right = 0  # index 0 grows to the patient's right
        liver, vertebrae, spleen = (centre_mm(label, name)[right] for name in ("liver", "vertebrae", "spleen"))
        assert liver > vertebrae > spleen
        assert centre_mm(label, "vertebrae")[1] < centre_mm(label, "aorta")[1]  # the aorta lies before the spine


def test_patients_differ_and_a_seed_repeats_one(patients):
    again, _ = draw_torso(SIZE, SPACING_MM, np.random.default_rng(0))
    np.testing.assert_array_equal(again, patients[0][0])
    assert np.mean(patients[0][1] != patients[1][1]) > 0.01


def test_air_surrounds_the_body(patients):
    for hu, label in patients:
        assert np.median(hu[0]) < -950
        assert not label[0].any()


def test_files_are_ras_and_int16(cohort):
    folder, _ = cohort
    image = nib.load(folder / "validation" / "images" / "validation_000.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.get_data_dtype() == np.int16
    assert image.header.get_zooms() == (5.0, 5.0, 5.0)


def test_sites_annotate_different_classes_and_validation_all(cohort):
    _, sources = cohort
    joined = open_source(sources[0])
    annotated = {case.name: case.reliable for case in joined.cases}
    assert annotated == {
        "abdomen_000": ("liver", "spleen", "kidneys", "vertebrae"),
        "abdomen_001": ("liver", "spleen", "kidneys", "vertebrae"),
        "renal_000": ("kidneys", "aorta", "vertebrae"),
        "renal_001": ("kidneys", "aorta", "vertebrae"),
        "validation_000": CLASSES,
    }
    assert [case.split for case in open_source(sources[1]).cases] == ["unlabelled"]


def test_a_label_file_holds_no_class_that_its_site_did_not_annotate(cohort):
    folder, _ = cohort
    entries = json.loads((folder / "renal" / "dataset.json").read_text())["training"]
    label = np.asanyarray(nib.load(folder / "renal" / entries[0]["label"]).dataobj)
    assert {CLASSES[k - 1] for k in np.unique(label) if k} == set(entries[0]["annotated"])
