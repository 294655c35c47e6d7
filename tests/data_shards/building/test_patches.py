"""Patches: a grid that covers the volume, leaves air out, and keeps every voxel where it was."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mixcl_dist.data_shards.building.patches import cut, pad_to, patch_origins
from mixcl_dist.data_shards.volume import Volume


def volume_of(hu: np.ndarray, label: np.ndarray | None = None) -> Volume:
    affine = np.array([[1.5, 0.1, 0, -20], [-0.1, 1.5, 0, 30], [0, 0, 4, 7], [0, 0, 0, 1]], dtype=float)
    return Volume(hu.astype(np.int16), affine, label)


@settings(deadline=None, max_examples=50)
@given(
    shape=st.tuples(*[st.integers(8, 40)] * 3),
    patch=st.tuples(*[st.integers(3, 8)] * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.9]),
)
def test_patches_cover_every_voxel_from_border_to_border_with_at_least_the_overlap(shape, patch, overlap):
    origins = np.array(patch_origins(volume_of(np.zeros(shape)), patch, overlap, min_body_fraction=1.0))
    for axis in range(3):
        starts = np.unique(origins[:, axis])
        assert starts[0] == 0 and starts[-1] + patch[axis] == shape[axis]
        steps = np.diff(starts)
        assert (steps <= max(1, patch[axis] * (1 - overlap))).all()
        assert len(steps) == 0 or steps.max() - steps.min() <= 1, "evenly spread"
    assert len(origins) == np.prod([len(np.unique(origins[:, axis])) for axis in range(3)]), "every combination"


def test_patches_with_less_body_than_asked_are_skipped():
    hu = np.full((20, 10, 10), -1000)
    hu[10:15] = 0  # half of the second patch
    assert patch_origins(volume_of(hu), (10, 10, 10), 0.0, 0.5) == [(10, 0, 0)]
    assert patch_origins(volume_of(hu), (10, 10, 10), 0.0, 0.51) == []
    assert len(patch_origins(volume_of(hu), (10, 10, 10), 0.0, 0.0)) == 2


def test_minus_500_hu_is_still_air():
    assert patch_origins(volume_of(np.full((4, 4, 4), -500)), (4, 4, 4), 0.0, 0.1) == []
    assert patch_origins(volume_of(np.full((4, 4, 4), -499)), (4, 4, 4), 0.0, 0.1) == [(0, 0, 0)]


def test_a_volume_smaller_than_a_patch_gets_air_at_its_far_end():
    volume = volume_of(np.full((5, 9, 3), 40), np.ones((5, 9, 3), np.uint8))
    padded = pad_to(volume, (8, 8, 8))
    assert padded.hu.shape == padded.label.shape == (8, 9, 8)
    assert (padded.hu[:5, :, :3] == 40).all() and (padded.label[:5, :, :3] == 1).all()
    padded.hu[:5, :, :3], padded.label[:5, :, :3] = -1024, 0
    assert (padded.hu == -1024).all() and (padded.label == 0).all()
    np.testing.assert_array_equal(padded.affine, volume.affine)


@given(shape=st.tuples(*[st.integers(1, 12)] * 3), patch=st.tuples(*[st.integers(1, 12)] * 3), share=st.floats(0.01, 1))
def test_padding_counts_neither_as_body_nor_as_air(shape, patch, share):
    """However thin a scan is: it is cut where its own voxels hold enough body, as one that needs no padding."""
    hu = np.where(np.random.default_rng(sum(shape)).random(shape) < 0.5, 40, -1000)
    within = tuple(min(length, edge) for length, edge in zip(shape, patch, strict=True))
    found = patch_origins(volume_of(hu), patch, 0.25, share)
    assert found == [
        origin
        for origin in patch_origins(volume_of(np.zeros(shape)), patch, 0.25, 0.0)
        if (hu[tuple(slice(o, o + edge) for o, edge in zip(origin, within, strict=True))] > -500).mean() >= share
    ]
    padded = pad_to(volume_of(hu), patch)
    assert all(cut(padded, origin, patch).hu.shape == patch for origin in found)


def test_a_cut_patch_lies_where_it_lay_in_the_volume():
    rng = np.random.default_rng(0)
    volume = volume_of(rng.integers(-1000, 1000, (20, 21, 22)), rng.integers(0, 5, (20, 21, 22), dtype=np.uint8))
    patch = cut(volume, (3, 7, 11), (8, 9, 10))
    assert patch.hu.shape == patch.label.shape == (8, 9, 10)
    inside = np.array([2, 5, 6])
    assert patch.hu[tuple(inside)] == volume.hu[5, 12, 17] and patch.label[tuple(inside)] == volume.label[5, 12, 17]
    np.testing.assert_allclose(patch.affine @ [*inside, 1], volume.affine @ [5, 12, 17, 1])
