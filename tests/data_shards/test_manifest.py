"""Manifest: says what the shards hold, refuses what it cannot read, and finds every shard that is not as built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mixcl_dist.data_shards.build import build
from mixcl_dist.data_shards.codec import decode
from mixcl_dist.data_shards.manifest import CASES_FILE, CLASSES_FILE, Manifest, ManifestError, inspect, verify
from mixcl_dist.data_shards.shard import index_path, read_index, read_sample


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
        ("{", "is not a manifest; build the shards again"),
        ("[]", "is not a manifest; build the shards again"),
        ('{"version": 3}', "has format 3, this version reads 2; update mixcl-dist"),
        ('{"version": 1}', "has format 1, this version reads 2; build the shards again"),
        ('{"version": 2}', "patch_size: Field required; build the shards again"),
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


def test_inspect_counts_what_is_on_disk(built):
    summary = inspect(built)
    indices = [json.loads(path.read_text())["samples"] for path in built.glob("*.index.json")]
    keys = [key for index in indices for key in index]
    assert summary["patches"] == len(keys) > 20
    assert summary["shards"] == len(list(built.glob("*.tar")))
    assert summary["bytes"] == sum(path.stat().st_size for path in built.glob("*.tar"))
    assert summary["bytes_per_voxel"] == pytest.approx(summary["bytes"] / len(keys) / 16**3)
    groups = {group["split"]: group for group in summary["datasets"]}
    assert groups["training"] | {"patches": 0, "dataset": ""} == {
        "dataset": "",
        "split": "training",
        "cases": 2,
        "labelled": 2,
        "patches": 0,
        "annotated": {"core": 2},
    }
    assert groups["unlabelled"]["patches"] == sum(key.startswith(("c_", "d_", "e_")) for key in keys)
    np.testing.assert_allclose(summary["spacing_range_mm"], [(2, 2), (2, 2), (3, 3)])
    assert json.dumps(summary), "plain values"


def test_the_histogram_counts_the_volumes_voxels_in_bins_of_64_hu(cohort, small_config, tmp_path):
    source = cohort("h")
    manifest = build([source], tmp_path / "out", small_config).manifest
    hu = np.asarray(nib.load(source / "h.nii.gz").dataobj)  # its body nearly fills it: the margin keeps all
    expected = [np.count_nonzero((hu >= low) & (hu < low + 64)) for low in range(-1024, 3072, 64)]
    expected[0] += np.count_nonzero(hu < -1024)
    np.testing.assert_array_equal(manifest.hu_histogram, expected)


def test_whole_shards_verify(built):
    assert verify(built) == []


def damage_payload(folder: Path) -> str:
    path = folder / "shard-000001.tar"
    key, members = next(iter(read_index(path).samples.items()))
    _flip(path, members["ct.b2"].offset + 40)
    return f"shard-000001.tar: {key}.ct.b2 is damaged"


def damage_header(folder: Path) -> str:
    path = folder / "shard-000001.tar"
    key, members = list(read_index(path).samples.items())[-1]
    _flip(path, members["json"].offset - 512)
    return f"shard-000001.tar: {key}.json has a damaged header"


def cut(folder: Path) -> str:
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-20000])
    return "shard-000000.tar: "


def remove(folder: Path) -> str:
    (folder / "shard-000001.tar").unlink()
    return "shard-000001.tar: is missing"


def add(folder: Path) -> str:
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000099.tar")
    return "shard-000099.tar: is not in the manifest"


def swap(folder: Path) -> str:
    """A shard with its own, matching index, but not the one that was built."""
    for of in (lambda path: path, index_path):
        shutil.copy(of(folder / "shard-000000.tar"), of(folder / "shard-000001.tar"))
    return "shard-000001.tar: is not the shard that the manifest names"


def miscount(folder: Path) -> str:
    content = json.loads((folder / "manifest.json").read_text())
    content["cases"][0]["patches"] += 1
    (folder / "manifest.json").write_text(json.dumps(content))
    return f"{content['cases'][0]['name']} has {content['cases'][0]['patches'] - 1} patches, the manifest says"


@pytest.mark.parametrize("damage", [damage_payload, damage_header, cut, remove, add, swap, miscount])
def test_verify_names_what_is_damaged(copy, damage):
    expected = damage(copy)
    problems = verify(copy)
    assert any(expected in problem for problem in problems), problems


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


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


def test_a_table_of_other_shards_is_refused(built):
    with pytest.raises(ManifestError, match="is not the table that the manifest names"):
        Manifest.load(built).check_table(CASES_FILE, b"other", built / CASES_FILE)
