"""Build: the same sources give the same shards, however often it is killed; what is bad is set aside and named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from mixcl_dist.cli import main
from mixcl_dist.data_shards.building import spool
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.building.processes import in_this_process
from mixcl_dist.data_shards.building.settings import BuildConfig, BuildError
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.data_shards.inspection.verify import verify
from mixcl_dist.data_shards.storage.publishing import exclusive

from .reading import begin, kill, published, samples_of, script


def test_every_sample_holds_the_voxels_of_its_case_at_its_place(cohort, small_config, tmp_path):
    source = cohort("a", "b", labelled=1)
    build([source], tmp_path / "out", small_config)
    samples = samples_of(tmp_path / "out")
    for sample in samples:
        image = nib.load(source / f"{sample['case']}.nii.gz")
        box = tuple(slice(first, first + 16) for first in sample["offset_voxels"])
        np.testing.assert_array_equal(sample["ct.b2"], np.maximum(np.asarray(image.dataobj)[box], -1024))
        np.testing.assert_allclose(
            np.array(sample["affine"])[:3, 3], nib.affines.apply_affine(image.affine, sample["offset_voxels"])
        )
        np.testing.assert_allclose(sample["spacing_mm"], image.header.get_zooms())
        assert (sample["split"], sample["annotated"]) == {"a": ("training", ["core"]), "b": ("unlabelled", [])}[
            sample["case"]
        ]
        if sample["case"] == "a":
            label = np.asarray(nib.load(source / "a_label.nii.gz").dataobj)
            np.testing.assert_array_equal(sample["seg.b2"], label[box])
        else:
            assert "seg.b2" not in sample
    assert {sample["case"] for sample in samples} == {"a", "b"}


def test_keys_and_counts_are_those_of_the_manifest(built):
    manifest, samples = Manifest.load(built), samples_of(built)
    assert {s["key"] for s in samples} == {f"{c.name}_{n:04d}" for c in manifest.cases for n in range(c.patches)}
    assert len(samples) == manifest.patches
    assert Counter(s["shard"] for s in samples) == {shard.file: shard.samples for shard in manifest.shards}
    assert all(shard.samples == 10 for shard in manifest.shards[:-1])


def test_shards_do_not_depend_on_the_number_of_workers_and_a_finished_build_is_left_alone(
    cohort, small_config, tmp_path
):
    source = cohort("a", "b", "c")
    one = build([source], tmp_path / "one", small_config)
    build([source], tmp_path / "two", dataclasses.replace(small_config, workers=2))
    assert published(tmp_path / "one") == published(tmp_path / "two")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").glob("shard*")}
    again = build([source], tmp_path / "one", small_config)
    assert again.manifest == one.manifest
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").glob("shard*")}


def test_resampling_gives_the_asked_spacing(cohort, small_config, tmp_path):
    config = dataclasses.replace(small_config, spacing_mm=(3.0, 3.0, 3.0), patch_size=(8, 8, 8))
    build([cohort("a")], tmp_path / "out", config)
    for sample in samples_of(tmp_path / "out"):
        np.testing.assert_allclose(sample["spacing_mm"], 3.0)


def test_faces_are_counted_in_one_warning(cohort, small_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spool, "shows_face", lambda volume: volume.hu.size > 0)
    source, out = cohort("a", "b"), tmp_path / "out"
    manifest = build([source], out, small_config, run=in_this_process).manifest
    assert [case.shows_face for case in manifest.cases] == [True, True]
    settings = ["--build.patch_size", "16,16,16", "--build.samples_per_shard", "10", "--build.min_body_fraction", "0.2"]
    assert main(["shards", "build", str(source), "--out", str(out), *settings]) == 0
    assert capsys.readouterr().err.count("2 cases show a face, by which a patient can be known: a, b") == 1


def test_validation_cases_stay_out(cohort, small_config, tmp_path):
    source = cohort("a", "b", labelled=2)
    content = json.loads((source / "dataset.json").read_text())
    content["validation"] = [content["training"].pop()]
    (source / "dataset.json").write_text(json.dumps(content))
    assert [case.name for case in build([source], tmp_path / "out", small_config).manifest.cases] == ["a"]


def test_bad_cases_are_set_aside_and_named_while_the_rest_is_built(cohort, small_config, tmp_path):
    source = cohort("a", "b", "c")
    scan = (source / "b.nii.gz").read_bytes()
    (source / "b.nii.gz").write_bytes(scan[: len(scan) // 2])
    shutil.copy(source / "a.nii.gz", source / "copy.nii.gz")
    content = json.loads((source / "dataset.json").read_text())
    content["training"] += [{"image": "copy.nii.gz"}, {"image": "gone.nii.gz"}]
    (source / "dataset.json").write_text(json.dumps(content))
    result = build([source], tmp_path / "out", small_config)
    assert [case.name for case in result.manifest.cases] == ["a", "c"]
    lines = sorted(map(str, result.quarantined))
    assert len(lines) == 3 and not any("\n" in line for line in lines)
    assert lines[0].startswith(str(source / "b.nii.gz"))
    assert lines[1] == f"{source / 'copy.nii.gz'}: has the same voxels as case a; remove one of them"
    assert "gone.nii.gz" in lines[2]
    listed = [json.loads(line) for line in (tmp_path / "out/.build/quarantine.jsonl").read_text().splitlines()]
    assert sorted((entry["case"] or "", Path(entry["file"]).name) for entry in listed) == [
        ("", "dataset.json"),
        ("b", "b.nii.gz"),
        ("copy", "copy.nii.gz"),
    ]
    assert [str(e) for e in build([source], tmp_path / "out", small_config).quarantined] == [
        str(e) for e in result.quarantined
    ]


def test_when_no_case_can_be_used_it_says_so(cohort, small_config, tmp_path):
    source = cohort("a")
    (source / "a.nii.gz").write_bytes(b"nothing")
    with pytest.raises(BuildError, match="no case could be used"):
        build([source], tmp_path / "out", small_config)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_another_configuration_is_refused_before_and_after_the_end(cohort, small_config, tmp_path):
    source, out = cohort("a", "b"), tmp_path / "out"
    build([source], out, small_config)
    other = dataclasses.replace(small_config, overlap=0.5)
    with pytest.raises(BuildError, match=r"was begun with build\.overlap = 0\.25; keep it, give another --out"):
        build([source], out, other)
    shutil.rmtree(out / ".build")
    with pytest.raises(BuildError, match=r"build\.overlap"):
        build([source], out, other)
    (out / "manifest.json").unlink()
    with pytest.raises(BuildError, match=r"shard-000000.*is not of this build"):
        build([source], out, small_config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("patch_size", (0, 8, 8)), ("overlap", 1.0), ("spacing_mm", (1.0, 0.0, 1.0)), ("workers", 0), ("quantise_hu", -1)],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        BuildConfig(**{name: value})


def test_an_unwritable_folder_is_one_clear_line(cohort, small_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError) as refused:
        build([cohort("a")], tmp_path / "file" / "out", small_config)
    assert str(refused.value) == f"{tmp_path / 'file' / 'out'}: Not a directory; give an --out that can be written"


def test_two_builds_in_one_folder_do_not_disturb_each_other(cohort, small_config, tmp_path):
    (tmp_path / "out" / ".build").mkdir(parents=True)
    with exclusive(tmp_path / "out" / ".build" / "lock"), pytest.raises(BuildError, match="another build"):
        build([cohort("a")], tmp_path / "out", small_config)


def test_a_really_full_disk(cohort, tmp_path):
    """A small tmpfs in a name space of its own; later it is made larger and the build goes on."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user name space to mount a small disk in; sysctl kernel.unprivileged_userns_clone=1")
    source, disk = cohort("a", "b", "c"), tmp_path / "disk"
    disk.mkdir()
    command = f"{sys.executable} {script(tmp_path)} {source} {disk}/out 1"
    shell = f"""
        mount -t tmpfs -o size=200k tmpfs {disk}
        {command} 2> {tmp_path}/error && exit 9
        test -e {disk}/out/manifest.json && exit 8
        mount -o remount,size=50m {disk}
        {command} && cp -r {disk}/out {tmp_path}/out
    """
    done = subprocess.run(["unshare", "-rm", "sh", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert "BuildError" in (tmp_path / "error").read_text().splitlines()[-1]
    assert "No space left on device; free space" in (tmp_path / "error").read_text().splitlines()[-1]
    assert verify(tmp_path / "out") == []


@pytest.mark.slow
def test_a_build_killed_again_and_again_ends_with_the_same_bytes(cohort, tmp_path):
    source, out = cohort("a", "b", "c", "d"), tmp_path / "out"
    subprocess.run([sys.executable, script(tmp_path), source, tmp_path / "whole", "1"], check=True)
    whole = published(tmp_path / "whole")
    moments = {
        "a case is being written": "list(out.glob('.build/cases/.*.tar.*.tmp'))",
        "a later case is being written":
            "list(out.glob('.build/cases/*.outcome.json')) and list(out.glob('.build/cases/.*.tmp'))",
        "a shard has no index yet": "len(list(out.glob('*.tar'))) > len(list(out.glob('*.index.json')))",
        "a later shard is being written": "(out / 'shard-000002.tar').exists()",
    }  # fmt: skip
    for moment, expression in moments.items():
        kill(begin(tmp_path, source, out, 2, expression))
        for path in out.glob("shard-*"):
            assert path.read_bytes() == whole[path.name], f"half a shard is visible, killed while {moment}"
        assert not (out / "manifest.json").exists()
    subprocess.run([sys.executable, script(tmp_path), source, out, "2"], check=True)
    assert published(out) == whole
    assert not list(out.rglob("*.tmp")) and not (out / ".build" / "cases").exists()


def test_voxels_of_real_scans_lie_where_simpleitk_says(ct, tmp_path):
    torso = sorted((ct / "torso" / "images").glob("*.nii.gz"), key=lambda path: path.stat().st_size)[0]
    openkbp = ct / "openkbp" / "imagesTr" / "openkbp_001.nii.gz"
    files = {path.name.split(".")[0]: path for path in (torso, openkbp)}
    content = {"modality": {"0": "CT"}, "labels": {}, "training": [{"image": str(path)} for path in files.values()]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    build([tmp_path / "dataset.json"], tmp_path / "out", BuildConfig(patch_size=(32, 32, 32), samples_per_shard=64))
    assert verify(tmp_path / "out") == []
    samples = samples_of(tmp_path / "out")
    images = {name: sitk.ReadImage(str(path)) for name, path in files.items()}
    rng = np.random.default_rng(0)
    checked = Counter()
    for sample in rng.choice(samples, 60, replace=False):
        image = images[sample["case"]]
        for index in rng.integers(0, 32, (20, 3)):
            ras = np.array(sample["affine"]) @ [*index, 1]
            place = image.TransformPhysicalPointToContinuousIndex([-ras[0], -ras[1], ras[2]])
            np.testing.assert_allclose(
                place, np.rint(place), atol=1e-3, err_msg="a voxel's centre stays a voxel's centre"
            )
            there = [round(p) for p in place]
            if all(0 <= p < size for p, size in zip(there, image.GetSize(), strict=True)):
                assert sample["ct.b2"][tuple(index)] == max(-1024, round(image.GetPixel(there)))
                checked[sample["case"]] += 1
            else:
                assert sample["ct.b2"][tuple(index)] == -1024, "padding"
    assert len(checked) == 2 and sum(checked.values()) > 500


def test_the_cure_of_damage_is_one(cohort, small_config, tmp_path):
    source, out = cohort("a"), tmp_path / "out"
    build([source], out, small_config)
    shard = next(out.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    build([source], out, small_config)
    assert verify(out), "what is finished is left alone"
    shutil.rmtree(out)
    build([source], out, small_config)
    assert verify(out) == []
