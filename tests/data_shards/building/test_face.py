"""Heads are recognised among real CT of other parts of the body."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scipy import ndimage

from mixcl_dist.data_shards.building.face import _closed, shows_face
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.sources import CaseError, Source, open_source, read_case
from mixcl_dist.data_shards.volume import Volume, resample


def recognised(source: Source, step: int) -> list[bool]:
    return [shows_face(read_case(case, Catalogue(source.classes))) for case in source.cases[::step]]


def without_labels(folder: Path) -> list[Volume]:
    volumes = []
    for case in open_source(folder).cases:
        try:
            volumes.append(read_case(case, Catalogue(open_source(folder).classes)))
        except CaseError as problem:
            assert "a mask" in str(problem)
    return volumes


@pytest.fixture(scope="module")
def head(ct, tmp_path_factory) -> Volume:
    """The upper, evenly spaced slices of a real head."""
    folder = tmp_path_factory.mktemp("head")
    files = sorted(
        (ct / "dicom/qa_ge_head").iterdir(),
        key=lambda file: float(pydicom.dcmread(file, stop_before_pixels=True).ImagePositionPatient[2]),
    )
    for file in files[14:]:
        shutil.copyfile(file, folder / file.name)
    (case,) = open_source(folder).cases
    return read_case(case, Catalogue(()))


def test_a_head_is_recognised_at_any_spacing(head):
    assert shows_face(head)
    for spacing in ((1.0, 1.0, 5.0), (3.0, 3.0, 3.0), (4.0, 4.0, 7.0)):
        assert shows_face(resample(head, spacing)), spacing


def test_heads_and_necks_are_recognised(ct):
    assert np.mean(recognised(open_source(ct / "openkbp"), step=12)) > 0.8


@pytest.mark.slow
def test_more_than_nine_of_ten_heads_and_necks_are_recognised(ct):
    """Those that are not are cut far inside the skin, and the skull with it."""
    found = recognised(open_source(ct / "openkbp"), step=1)
    assert len(found) == 203 and np.mean(found) > 0.9


@pytest.mark.parametrize("folder", ["torso", "dicom/totalseg_j2k", "dicom/liver_seg", "dicom/mixed_series", "sarcoma"])
def test_no_other_part_of_the_body_is_taken_for_a_head(ct, folder):
    volumes = without_labels(ct / folder)
    assert volumes and not any(map(shows_face, volumes))


@pytest.mark.parametrize(("inside", "is_head"), [(35, True), (-850, False), (150, False)])
def test_bone_around_brain_is_a_head_but_not_around_air_or_contrast(inside, is_head):
    radius = np.hypot(*np.meshgrid(np.arange(-30, 30), np.arange(-30, 30)))
    cut = np.select([radius < 24, radius < 26, radius < 28], [inside, 900, 40], -1000).astype(np.int16)
    volume = Volume(np.repeat(cut[:, :, None], 5, axis=2), np.diag([3.0, 3.0, 3.0, 1.0]))
    assert shows_face(volume) == is_head


def test_a_volume_without_bone_shows_no_face():
    assert not shows_face(Volume(np.full((30, 30, 10), 40, np.int16), np.diag([3.0, 3.0, 3.0, 1.0])))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_bone_is_closed_as_scipy_closes_each_cut(steps):
    bone = np.random.default_rng(steps).random((23, 17, 6)) < 0.05 * steps
    bone[:, 0, 0] = bone[5:9, 3:14, 5] = True
    for k in range(bone.shape[2]):
        padded = np.pad(bone[:, :, k], steps)
        expected = ndimage.binary_closing(padded, iterations=steps)[steps:-steps, steps:-steps]
        np.testing.assert_array_equal(_closed(bone, steps)[:, :, k], expected)


def test_a_ring_that_the_border_cuts_open_shuts_nothing_in():
    radius = np.hypot(*np.meshgrid(np.arange(-30, 30), np.arange(-30, 30)))
    cut = np.select([radius < 24, radius < 26], [35, 900], -1000).astype(np.int16)
    for part in (cut[30:], cut[:, :30]):
        volume = Volume(np.repeat(part[:, :, None], 5, axis=2), np.diag([3.0, 3.0, 3.0, 1.0]))
        assert not shows_face(volume)
