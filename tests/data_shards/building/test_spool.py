"""The spool: a case's patches hold its voxels under keys of their own."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.building.processes import in_this_process
from mixcl_dist.data_shards.building.settings import BuildConfig
from mixcl_dist.data_shards.building.spool import quantised
from mixcl_dist.data_shards.format.codec import DESCRIPTION
from mixcl_dist.data_shards.inspection.verify import verify

from .reading import samples_of


def test_a_volume_smaller_than_a_patch_is_padded_with_air(cohort, small_config, tmp_path):
    config = dataclasses.replace(small_config, patch_size=(64, 16, 16), min_body_fraction=0.0)
    build([cohort("a")], tmp_path / "out", config)
    for sample in samples_of(tmp_path / "out"):
        assert sample["offset_voxels"][0] == 0 and (sample["ct.b2"][40:] == -1024).all()


def test_a_slab_of_three_slices_is_used_with_default_settings(cohort, tmp_path):
    source = cohort("a")
    image = nib.load(source / "a.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:, :, 14:17], image.affine), source / "a.nii.gz")
    build([source], tmp_path / "out", BuildConfig(), run=in_this_process)
    (sample,) = samples_of(tmp_path / "out")
    slab = np.maximum(nib.load(source / "a.nii.gz").dataobj, -1024)
    np.testing.assert_array_equal(sample["ct.b2"][:40, :36, :3], slab)
    assert (sample["ct.b2"][:, :, 3:] == -1024).all()


@pytest.mark.parametrize(("codec", "member"), [("fast", "ct.b2"), ("small", "ct.pco")])
def test_both_profiles_hold_the_same_voxels_and_say_how(cohort, small_config, tmp_path, codec, member):
    source = cohort("a", labelled=1)
    config = dataclasses.replace(small_config, codec=codec)
    manifest = build([source], tmp_path / "out", config, run=in_this_process).manifest
    assert manifest.codec == {member: DESCRIPTION[member], "seg.b2": DESCRIPTION["seg.b2"]}
    assert manifest.settings["codec"] == codec and verify(tmp_path / "out") == []
    hu = np.asarray(nib.load(source / "a.nii.gz").dataobj)
    for sample in samples_of(tmp_path / "out"):
        box = tuple(slice(first, first + 16) for first in sample["offset_voxels"])
        np.testing.assert_array_equal(sample[member], np.maximum(hu[box], -1024))


@pytest.mark.parametrize("step", [2, 3, 10])
def test_quantising_moves_no_voxel_by_more_than_half_a_step_and_leaves_air_alone(cohort, small_config, tmp_path, step):
    source = cohort("a")
    config = dataclasses.replace(small_config, quantise_hu=step, patch_size=(64, 16, 16), min_body_fraction=0.0)
    manifest = build([source], tmp_path / "out", config, run=in_this_process).manifest
    assert manifest.settings["quantise_hu"] == step
    hu = np.asarray(nib.load(source / "a.nii.gz").dataobj).astype(int)
    sizes = []
    for sample in samples_of(tmp_path / "out"):
        assert sample["quantise_hu"] == step
        x, y, z = sample["offset_voxels"]
        stored, original = sample["ct.b2"].astype(int), np.maximum(hu[x : x + 64, y : y + 16, z : z + 16], -1024)
        assert (2 * np.abs(stored[: len(original)] - original)).max() <= step
        assert (stored[len(original) :] == -1024).all() and not ((stored + 1024) % step).any()
        sizes.append(len(np.unique(stored)))
    assert max(sizes) > 20


@given(hnp.arrays(np.int16, (8,)), st.integers(1, 100))
def test_quantising_any_value(hu, step):
    hu = np.maximum(hu, -1024)
    assert (2 * np.abs(quantised(hu, step).astype(int) - hu)).max() <= step
    np.testing.assert_array_equal(quantised(hu, 0), hu)


def test_dots_in_names_neither_collide_nor_cut_a_key_short_for_webdataset(cohort, small_config, tmp_path):
    """To webdataset the key ends at the first dot: "scan.1" and "scan.2" would be members of one sample."""
    source = cohort("a", "b")
    content = json.loads((source / "dataset.json").read_text())
    for name, renamed in (("a", "scan.1.ct"), ("b", "scan.2.seg")):
        (source / f"{name}.nii.gz").rename(source / f"{renamed}.nii.gz")
    content["training"] = [{"image": "scan.1.ct.nii.gz"}, {"image": "scan.2.seg.nii.gz"}]
    (source / "dataset.json").write_text(json.dumps(content))
    manifest = build([source], tmp_path / "out", small_config, run=in_this_process).manifest
    assert [case.name for case in manifest.cases] == ["scan-1-ct", "scan-2-seg"]
    found = Counter(sample["key"].rpartition("_")[0] for sample in samples_of(tmp_path / "out"))
    assert found == {case.name: case.patches for case in manifest.cases} and verify(tmp_path / "out") == []
