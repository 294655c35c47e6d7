"""A voxel keeps its place in the patient, whatever is done to the grid."""

from __future__ import annotations

import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from mixcl_dist.data_shards.catalogue import merged
from mixcl_dist.data_shards.sources import open_source, read_case
from mixcl_dist.data_shards.volume import (
    CaseError,
    Grid,
    Volume,
    check_affine,
    crop_to_body,
    hu_counts,
    resample,
    to_ras,
    untilt,
)

AXES = st.permutations([0, 1, 2])
SIGNS = st.tuples(*[st.sampled_from([-1, 1])] * 3)
SPACINGS = st.tuples(*[st.floats(0.5, 6)] * 3)
ANGLES = st.tuples(*[st.floats(-20, 20)] * 3)


def affine_of(axes, signs, spacing, angles=(0, 0, 0), origin=(12.5, -80.25, 300.0)) -> np.ndarray:
    affine = np.eye(4)
    turned = np.eye(3)[:, axes] * signs
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ turned * spacing
    affine[:3, 3] = origin
    return affine


def positions(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    index = np.moveaxis(np.indices(shape), 0, -1).reshape(-1, 3)
    return index @ affine[:3, :3].T + affine[:3, 3]


def torso_case(ct: Path, name: str, spacing_mm=None) -> Volume:
    source = open_source(ct / "torso")
    case = next(case for case in source.cases if case.name == name)
    return read_case(case, merged([source.classes]), spacing_mm)


@given(AXES, SIGNS, SPACINGS, ANGLES)
def test_to_ras_turns_any_orientation_and_moves_no_voxel(axes, signs, spacing, angles):
    shape = (3, 4, 5)
    values = np.arange(60, dtype=np.int16).reshape(shape)
    affine = affine_of(axes, signs, spacing, angles)
    turned, turned_affine = to_ras(values, affine)
    assert nib.aff2axcodes(turned_affine) == ("R", "A", "S")
    before = positions(affine, shape)[np.argsort(values.ravel())]
    after = positions(turned_affine, turned.shape)[np.argsort(turned.ravel())]
    np.testing.assert_allclose(after, before, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(SPACINGS, SPACINGS, ANGLES)
def test_resample_keeps_a_ramp_in_world_coordinates(spacing, wanted, angles):
    """HU that grow linearly over the patient are the same function of position on any grid, blurred or
    not."""
    shape = tuple(int(np.ceil(60 / s)) for s in spacing)
    affine = affine_of([0, 1, 2], (1, 1, 1), spacing, angles)
    slope = np.array([2.0, -3.0, 1.5])

    def ramp(affine, shape):
        return ((positions(affine, shape) - affine_of([0, 1, 2], (1, 1, 1), spacing)[:3, 3]) @ slope).reshape(shape)

    volume = Volume(np.rint(ramp(affine, shape)).astype(np.int16), affine)
    new = resample(volume, wanted)
    np.testing.assert_allclose(new.spacing, wanted, rtol=1e-6)
    inner = tuple(slice(n // 4, n - n // 4) for n in new.hu.shape)
    np.testing.assert_allclose(new.hu[inner], ramp(new.affine, new.hu.shape)[inner], atol=1.5)


@given(SPACINGS, SPACINGS)
@settings(deadline=None)
def test_resample_covers_the_same_field(spacing, wanted):
    volume = Volume(np.zeros((20, 30, 25), np.int16), affine_of([0, 1, 2], (1, 1, 1), spacing))
    new = resample(volume, wanted)
    first, new_first = volume.affine @ [-0.5, -0.5, -0.5, 1], new.affine @ [-0.5, -0.5, -0.5, 1]
    np.testing.assert_allclose(new_first, first, atol=1e-9)
    extent = np.array(volume.hu.shape) * spacing
    assert np.all(np.abs(np.array(new.hu.shape) * wanted - extent) <= np.array(wanted) * 0.501)


def test_resample_to_finer_voxels_agrees_with_simpleitk(ct):
    volume = torso_case(ct, "totalseg_example")
    new = resample(volume, (2.3, 1.9, 2.6))  # no new voxel lies halfway between old ones
    reference = sitk.Resample(
        as_sitk(volume.hu, volume.affine),
        as_sitk(new.hu, new.affine),
        sitk.Transform(),
        sitk.sitkLinear,
        -1024,
        sitk.sitkFloat32,
    )
    expected = sitk.GetArrayFromImage(reference).T
    inner = (slice(2, -2),) * 3
    assert np.abs(new.hu[inner] - expected[inner]).max() <= 0.51
    labels = sitk.Resample(
        as_sitk(volume.label, volume.affine),
        as_sitk(new.label, new.affine),
        sitk.Transform(),
        sitk.sitkNearestNeighbor,
    )
    differ = (new.label != sitk.GetArrayFromImage(labels).T)[inner]
    assert differ.mean() < 1e-4


def test_resample_does_not_alias():
    """A pattern too fine for the new grid becomes its mean instead of a false coarse pattern."""
    hu = np.zeros((12, 12, 96), np.int16)
    hu[..., ::4] = 1000
    new = resample(Volume(hu, np.eye(4)), (1.0, 1.0, 3.0))
    inner = new.hu[:, :, 4:-4]
    assert abs(float(inner.mean()) - 250) < 15
    assert inner.max() - inner.min() < 250  # sampled without a blur it swings by 667 or more


def test_resample_leaves_organs_where_they_are(ct):
    before = torso_case(ct, "totalseg_example")
    after = torso_case(ct, "totalseg_example", spacing_mm=(4.1, 3.7, 5.0))
    large = [label for label in range(1, 118) if np.count_nonzero(before.label == label) > 2000]
    moved = np.array([centre_of(after, label) - centre_of(before, label) for label in large])
    assert len(large) > 20
    assert (
        np.abs(np.median(moved, axis=0)).max() < 0.25
    )  # a first voxel left where it was would shift all by 0.35 to 1 mm


def test_resample_to_its_own_spacing_changes_nothing(ct):
    volume = torso_case(ct, "ibsi_lung")
    assert resample(volume, volume.spacing) is volume


def test_crop_to_body_keeps_position_and_all_tissue(ct):
    volume = torso_case(ct, "crlm_1004")
    cropped = crop_to_body(volume, 10.0)
    assert cropped.hu.size < volume.hu.size
    assert np.count_nonzero(cropped.hu > -500) == np.count_nonzero(volume.hu > -500)
    image = as_sitk(volume.hu, volume.affine)
    for index in np.ndindex(3, 3, 3):
        voxel = tuple(int(i) for i in np.array(index) * (np.array(cropped.hu.shape) - 1) // 2)
        x, y, z, _ = cropped.affine @ [*voxel, 1]
        there = image.TransformPhysicalPointToIndex((-x, -y, z))
        assert image[there] == cropped.hu[voxel]


def test_crop_to_body_widens_by_the_margin_in_mm():
    hu = np.full((30, 30, 30), -1000, np.int16)
    hu[10:20, 12, 15] = 40
    volume = Volume(hu, np.diag([1.0, 2.0, 4.0, 1.0]), (hu > 0).astype(np.uint8))
    cropped = crop_to_body(volume, 5.0)
    assert cropped.hu.shape == (20, 7, 5) == cropped.label.shape
    assert np.argwhere(cropped.label)[0].tolist() == [5, 3, 2]
    np.testing.assert_allclose(cropped.affine[:3, 3], [5, 18, 52])


def test_every_value_of_hu_is_counted_in_any_order_of_memory():
    hu = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, (110, 110, 110)).astype(np.int16)  # over one block
    hu[0, 0, :2] = -32768, 32767
    counts = hu_counts(np.asfortranarray(hu))
    values, expected = np.unique(hu, return_counts=True)
    np.testing.assert_array_equal(counts[values.astype(int) + 32768], expected)
    assert counts.sum() == hu.size
    np.testing.assert_array_equal(hu_counts(hu[::3, :, ::-2]), hu_counts(hu[::3, :, ::-2].copy()))


def test_crop_to_body_returns_air_whole():
    volume = Volume(np.full((5, 5, 5), -1000, np.int16), np.eye(4))
    assert crop_to_body(volume, 1.0) is volume


@pytest.mark.parametrize(
    ("affine", "says"),
    [
        (np.diag([1.0, 1.0, 0.0, 1.0]), "1 x 1 x 0 mm"),
        (np.diag([1.0, 1.0, 51.0, 1.0]), "1 x 1 x 51 mm"),
        (np.diag([0.001, 0.001, 0.003, 1.0]), "0.001 x 0.001 x 0.003 mm"),
        (np.diag([1.0, 1.0, np.nan, 1.0]), "nan mm"),
        (np.array([[1.0, 0, 0, 0], [0, 1, 0.36, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "19.8 degrees"),
    ],
)
def test_impossible_grids_are_refused(affine, says):
    with pytest.raises(CaseError, match=says):
        check_affine(affine, Path("scan.nii.gz"))


def test_a_problem_is_one_line_and_crosses_processes():
    problem = CaseError("is\nbroken", where=Path("a/b.nii"), cure="copy it again")
    assert str(problem) == "a/b.nii: is broken; copy it again"
    again = pickle.loads(pickle.dumps(problem))
    assert (str(again), again.where, again.cure) == (str(problem), problem.where, problem.cure)


def as_sitk(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(array.T)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def centre_of(volume: Volume, label: int) -> np.ndarray:
    return np.argwhere(volume.label == label).mean(axis=0) @ volume.affine[:3, :3].T + volume.affine[:3, 3]


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_a_label_in_ras_goes_back_to_the_order_of_the_files(axes, flips):
    stored = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    affine = np.eye(4)
    affine[:3, :3] = np.diag([2.0, 3.0, 4.0] * np.array(flips))[:, axes]
    turned, _ = to_ras(stored, affine)
    np.testing.assert_array_equal(Grid(stored.shape, affine, untilts=False).from_ras(turned), stored)


def test_slices_of_a_tilted_gantry_go_back_to_where_they_were():
    """A slice that was moved by whole voxels comes back as it was."""
    stored = np.random.default_rng(0).integers(0, 500, (9, 11, 6)).astype(np.int16)
    affine = np.array([[-1.0, 0, 0, 5], [0, -1, 2, 3], [0, 0, 4, 7], [0, 0, 0, 1]])
    turned, right = to_ras(*untilt(stored, affine))
    grid = Grid(stored.shape, affine, untilts=True)
    np.testing.assert_array_equal(grid.from_ras(turned), stored)
    assert grid.upright[0] == turned.shape and np.allclose(abs(grid.upright[1][:3, :3]), abs(right[:3, :3]))
