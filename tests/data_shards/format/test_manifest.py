"""Manifest: says what the shards hold, and refuses what it cannot read."""

from __future__ import annotations

import io
import json
import shutil
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.format.codec import decode
from mixcl_dist.data_shards.format.fingerprint import fingerprint
from mixcl_dist.data_shards.format.manifest import (
    CASES_FILE,
    CLASSES_FILE,
    FINGERPRINTS_FILE,
    SPACING_EDGES_MM,
    Manifest,
    ManifestError,
)
from mixcl_dist.data_shards.format.shard import read_index, read_sample
from mixcl_dist.data_shards.volume import Volume


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "shards"))


def test_a_manifest_comes_back_as_it_was_saved_with_the_same_digest(built, tmp_path):
    manifest = Manifest.load(built)
    manifest.digest  # noqa: B018 - a digest already computed must not be saved as content
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert Manifest.load(tmp_path).digest == manifest.digest
    assert (tmp_path / "manifest.json").read_bytes() == (built / "manifest.json").read_bytes()


def test_the_digest_follows_the_content_and_not_its_layout(copy):
    before = Manifest.load(copy).digest
    content = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(content, indent=7))
    assert Manifest.load(copy).digest == before
    content["shards"][0]["xxh3"] = "0" * 16
    (copy / "manifest.json").write_text(json.dumps(content))
    assert Manifest.load(copy).digest != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; finish the build"),
        ("{", "is not a manifest; remove the folder and build the shards again"),
        ("[]", "is not a manifest; remove the folder and build the shards again"),
        ('{"version": 4}', "has format 4, this version reads 3; update mixcl-dist"),
        ('{"version": 2}', "has format 2, this version reads 3; remove the folder and build the shards again"),
        ('{"version": 3}', "patch_size: Field required; remove the folder and build the shards again"),
    ],
)
def test_what_is_not_a_manifest_is_refused_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ManifestError) as refused:
        Manifest.load(tmp_path)
    assert str(refused.value).startswith(str(tmp_path / "manifest.json")) and message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_shard_outside_of_the_folder_is_refused(copy):
    content = json.loads((copy / "manifest.json").read_text())
    content["shards"][0]["file"] = "../shard-000000.tar"
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=r"shards\.0\.file"):
        Manifest.load(copy)


def test_the_histogram_counts_the_volumes_voxels_in_bins_of_64_hu(cohort, small_config, tmp_path):
    source = cohort("h")
    manifest = build([source], tmp_path / "out", small_config).manifest
    hu = np.asarray(nib.load(source / "h.nii.gz").dataobj)  # its body nearly fills it: the margin keeps all
    expected = [np.count_nonzero((hu >= low) & (hu < low + 64)) for low in range(-1024, 3072, 64)]
    expected[0] += np.count_nonzero(hu < -1024)
    np.testing.assert_array_equal(manifest.hu_histogram, expected)


def test_the_tables_say_of_every_sample_its_case_and_the_classes_in_it(built):
    manifest = Manifest.load(built)
    cases, classes = (
        manifest.check_table(name, (built / name).read_bytes(), built / name) for name in (CASES_FILE, CLASSES_FILE)
    )
    samples = [(shard.file, key) for shard in manifest.shards for key in read_index(built / shard.file).samples]
    assert len(cases) == len(classes) == len(samples) == manifest.patches
    for row, (file, key) in enumerate(samples):
        assert manifest.cases[cases[row]].name == key.rpartition("_")[0]
        members = read_index(built / file).samples[key]
        seg = read_sample(built / file, key, {"seg.b2": members["seg.b2"]})["seg.b2"] if "seg.b2" in members else None
        has_core = seg is not None and bool((decode(seg, manifest.patch_size, np.uint8) == 1).any())
        assert bool(classes[row, 0] & 1) == has_core
    assert 0 < (classes & 1).sum() < len(samples)


def test_the_table_of_fingerprints_holds_those_of_the_scans(cohort, small_config, tmp_path):
    source = cohort("g", "h")
    manifest = build([source], tmp_path / "out", small_config).manifest
    path = tmp_path / "out" / FINGERPRINTS_FILE
    marks = manifest.check_table(FINGERPRINTS_FILE, path.read_bytes(), path)
    for case, mark in zip(manifest.cases, marks, strict=True):
        image = nib.load(source / f"{case.name}.nii.gz")
        hu = np.maximum(np.asarray(image.dataobj), -1024)
        np.testing.assert_array_equal(mark, fingerprint(Volume(hu, image.affine)))


def test_it_counts_spacings_and_annotated_classes(built):
    manifest = Manifest.load(built)
    for axis, spacing in zip(manifest.spacing_histogram, (2, 2, 3), strict=True):
        expected = [5 if low <= spacing < high else 0 for low, high in pairwise(SPACING_EDGES_MM)]
        assert list(axis) == expected
    (counts,) = manifest.annotated.values()
    assert counts == {"core": 2}


@pytest.mark.parametrize("name", [CASES_FILE, CLASSES_FILE, FINGERPRINTS_FILE])
def test_a_table_of_other_shards_is_refused(built, name):
    manifest, content = Manifest.load(built), (built / name).read_bytes()
    other = np.load(built / name)
    other[0] ^= 1
    for wrong in (b"other", content[:-1], content + b"x", npy(other), npy(other[:-1]), npy(other.astype(np.float32))):
        with pytest.raises(ManifestError, match=r"is not (the|a) table"):
            manifest.check_table(name, wrong, built / name)


@pytest.mark.parametrize("name", [CASES_FILE, CLASSES_FILE, FINGERPRINTS_FILE])
def test_a_table_that_an_append_has_made_longer_and_wider_still_has_this_manifests_rows(built, name):
    manifest, table = Manifest.load(built), np.load(built / name)
    longer = np.concatenate([table, table[:3]])
    if name == CLASSES_FILE:
        longer = np.pad(longer, ((0, 0), (0, 2)), constant_values=1)
    np.testing.assert_array_equal(manifest.check_table(name, npy(longer), built / name), table)


def test_a_header_that_states_terabytes_takes_no_memory(built):
    header = npy(np.zeros(0, np.uint32)).replace(b"(0,)", b"(%d,)" % 10**12)
    with pytest.raises(ManifestError, match="is not a table"):
        Manifest.load(built).check_table(CASES_FILE, header, built / CASES_FILE)


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()
