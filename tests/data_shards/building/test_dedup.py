"""Dedup: one scan is known again under another name and after common changes, other patients are not taken for it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from mixcl_dist.cli import main
from mixcl_dist.data_shards.building import build as building
from mixcl_dist.data_shards.building.dedup import matches, scans_of
from mixcl_dist.data_shards.building.processes import in_this_process
from mixcl_dist.data_shards.building.settings import BuildError
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.format.fingerprint import (
    HIGHEST,
    NEAR,
    PERIOD_MM,
    SIZE,
    fingerprint,
    near_pairs,
    voxel_digest,
)
from mixcl_dist.data_shards.format.manifest import table_digest
from mixcl_dist.data_shards.sources import CaseError, open_images, open_source, read_case
from mixcl_dist.data_shards.volume import Volume, resample

build = partial(building.build, run=in_this_process)


def blobs(seed: int, shape=(40, 44, 36), spacing=(5.0, 5.0, 6.0)) -> Volume:
    """A body of smooth random tissue in air."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=shape), 4)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    body = sum(axis**2 for axis in axes) < 0.8 + 5 * field
    hu = np.where(body, 1500 * field, -1000) + rng.normal(0, 5, shape)
    return Volume(np.rint(hu).astype(np.int16), np.diag([*spacing, 1.0]))


def distance(one: Volume, other: Volume) -> float:
    ((_, _, found),) = near_pairs(fingerprint(one)[None], fingerprint(other)[None], 2.1)
    return found


def test_a_fingerprint_is_the_fourier_transform_of_the_window_by_its_definition():
    volume = blobs(0, (9, 8, 7), (4.0, 3.0, 6.0))
    axes = (np.arange(n) * mm for n, mm in zip(volume.hu.shape, volume.spacing, strict=True))
    places = np.stack(np.meshgrid(*axes, indexing="ij"))
    window = np.clip(volume.hu, -150, 150) + 150
    ks = [k for k in np.ndindex(*[2 * HIGHEST + 1] * 3)]
    values = {}
    for k in np.array(ks) - HIGHEST:
        if 0 < np.linalg.norm(k) <= HIGHEST + 0.3 and tuple(k) > (0, 0, 0):
            wave = np.exp(-2j * np.pi / PERIOD_MM * np.tensordot(k, places, 1))
            values[tuple(k)] = (window * wave).sum() * (k**2).sum()
    expected = np.array([values[k] for k in sorted(values)])
    expected = np.concatenate([expected.real, expected.imag])
    found = fingerprint(volume)
    assert found.shape == (SIZE,) and found.dtype == np.int8
    np.testing.assert_allclose(found, expected / np.abs(expected).max() * 127, atol=0.51)


def test_a_shift_is_found_whatever_its_size():
    volume, rng = blobs(1), np.random.default_rng(1)
    for shift in rng.integers(0, 15, (10, 3)):
        padded = Volume(np.pad(volume.hu, [(int(n), 3) for n in shift], constant_values=-1024), volume.affine)
        assert distance(volume, padded) < 0.005


def test_every_pair_within_the_limit_is_found_and_no_other():
    """Against all pairs one by one: the quick test must not rule out a pair that is near."""
    volumes = [blobs(seed) for seed in range(6)]
    changed = [Volume(volume.hu[seed : 40 - seed], volume.affine) for seed, volume in enumerate(volumes)]
    ones, others = (np.array([fingerprint(v) for v in group]) for group in (volumes, changed))
    distances = np.array([[distance(one, other) for other in changed] for one in volumes])
    for limit in (0.01, 0.1, 0.5):
        found = {(i, j): d for i, j, d in near_pairs(ones, others, limit)}
        assert found.keys() == set(zip(*map(list, np.nonzero(distances < limit)), strict=True))
        for place, near in found.items():
            assert near == pytest.approx(distances[place], abs=1e-5)
    assert list(near_pairs(ones, others[:0])) == []


def test_spectra_that_differ_in_strength_alone_are_found_up_to_the_limit():
    """There the quick test knows the distance exactly."""
    one = fingerprint(blobs(0))
    strength = np.tile(np.random.default_rng(0).uniform(0.4, 1, SIZE // 2), 2)
    other = np.rint(one * strength).astype(np.int8)
    ((_, _, apart),) = near_pairs(one[None], other[None], 2.1)
    assert apart > 0.01
    assert len(list(near_pairs(one[None], other[None], 1.02 * apart))) == 1
    assert list(near_pairs(one[None], other[None], 0.98 * apart)) == []


def test_different_bodies_are_far_apart_and_an_empty_volume_is_like_nothing():
    assert all(distance(blobs(0), blobs(seed)) > 5 * NEAR for seed in range(1, 8))
    empty = Volume(np.full((20, 20, 20), -1000, np.int16), np.eye(4))
    assert distance(blobs(0), empty) == pytest.approx(1) and distance(empty, empty) == pytest.approx(1)


def test_the_digest_is_of_shape_and_voxels_alone():
    hu = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    assert voxel_digest(hu) == voxel_digest(np.asfortranarray(hu))
    assert len({voxel_digest(hu), voxel_digest(hu.reshape(3, 2, 4)), voxel_digest(hu + np.int16(1))}) == 3


def test_real_scans_are_known_again_after_common_changes_and_patients_are_kept_apart(ct):
    source = open_source(ct / "openkbp")
    volumes = [read_case(case, Catalogue(source.classes)) for case in source.cases[:40:4]]
    rng = np.random.default_rng(0)
    changed = []
    for volume in volumes:
        noisy = np.maximum(-1024, np.rint(volume.hu + rng.normal(0, 20, volume.hu.shape))).astype(np.int16)
        small = resample(Volume(noisy[1:-2, 2:-1, 2:-2], volume.affine), (3.0, 3.0, 3.0))
        changed.append(Volume(np.clip(small.hu, -200, 300), small.affine))
    ones, others = (np.array([fingerprint(v) for v in group]) for group in (volumes, changed))
    assert {(i, j) for i, j, _ in near_pairs(ones, others)} == {(i, i) for i in range(len(volumes))}
    assert {(i, j) for i, j, _ in near_pairs(ones, ones)} == {(i, i) for i in range(len(volumes))}


def save(volume: Volume, path: Path) -> None:
    nib.save(nib.Nifti1Image(volume.hu, volume.affine), path)


@pytest.fixture
def archive(tmp_path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    for seed, name in enumerate("abc"):
        save(blobs(seed), folder / f"{name}.nii.gz")
    return folder


@pytest.fixture
def test_set(tmp_path) -> Path:
    """b turned to LPS, and a resampled: both under other names."""
    folder = tmp_path / "test"
    folder.mkdir()
    b = blobs(1)
    turned = np.diag([-5.0, -5.0, 6.0, 1.0])
    nib.save(nib.Nifti1Image(b.hu[::-1, ::-1], turned), folder / "one.nii.gz")
    save(resample(blobs(0), (4.0, 4.0, 4.0)), folder / "two.nii.gz")
    save(blobs(9), folder / "three.nii.gz")
    return folder


def pairs(output: str) -> set[tuple[str, str, bool]]:
    """(name, name, exact) of the lines."""
    lines = [line for line in output.splitlines() if " and " in line]
    return {(line.split()[0], line.split(" and ")[1].split()[0], line.endswith("the same voxels")) for line in lines}


@pytest.mark.parametrize("built", [False, True])
def test_the_verb_lists_pairs_and_its_exit_code_says_whether_there_are_any(
    archive, test_set, small_config, tmp_path, capsys, built
):
    if built:
        build([archive], tmp_path / "shards", small_config)
    one = tmp_path / "shards" if built else archive
    names = {path.name.split(".")[0]: case.name for path, case in listed(archive) + listed(test_set)}
    assert main(["shards", "dedup", str(one), "--against", str(test_set)]) == 1
    output = capsys.readouterr().out
    assert pairs(output) == {(names["b"], names["one"], True), (names["a"], names["two"], False)}
    assert "pairs that are one scan: 2; 3 scans held against 3" in output
    for name in ("one", "two"):
        (test_set / f"{name}.nii.gz").unlink()
    assert main(["shards", "dedup", str(one), "--against", str(test_set)]) == 0


def listed(folder: Path) -> list[tuple[Path, object]]:
    return [(case.files[0], case) for case in open_source(folder).cases]


def test_a_scan_that_cannot_be_compared_is_not_passed_over(archive, test_set, capsys):
    for path in test_set.iterdir():
        path.write_bytes(b"nothing")
    assert main(["shards", "dedup", str(archive), "--against", str(test_set)]) == 1
    assert capsys.readouterr().err.count("not compared: ") == 3


def test_within_one_set_a_scan_is_held_against_the_others_alone(archive):
    shutil.copy(archive / "a.nii.gz", archive / "z.nii.gz")
    scans = scans_of([archive], in_this_process, lambda *_: None).found
    found = {(match.one.name, match.other.name, match.distance) for match in matches(scans, scans)}
    assert len(found) == 2 and all(d is None for *_, d in found), "a with z, and z with a"


def test_a_build_keeps_out_what_is_listed_and_says_so(archive, test_set, small_config, tmp_path):
    result = build([archive], tmp_path / "out", small_config, exclude=[test_set])
    c = next(case.name for path, case in listed(archive) if path.name == "c.nii.gz")
    assert [case.name for case in result.manifest.cases] == [c]
    lines = sorted(map(str, result.quarantined))
    assert "a.nii.gz: is kept out as" in lines[0] and "distance 0.0" in lines[0]
    assert "b.nii.gz: is kept out as" in lines[1] and "the same voxels" in lines[1]
    again = build([archive], tmp_path / "out", small_config)
    assert len(again.manifest.cases) == 3, "no longer kept out"
    with pytest.raises(BuildError, match="holds 2 scans to be kept out"):
        build([archive], tmp_path / "out", small_config, exclude=[test_set])


def test_a_build_does_not_begin_when_what_is_to_be_kept_out_cannot_be_read(archive, test_set, small_config, tmp_path):
    (test_set / "two.nii.gz").write_bytes(b"nothing")
    with pytest.raises(BuildError, match=r"to be kept out cannot be read: .*two\.nii\.gz"):
        build([archive], tmp_path / "out", small_config, exclude=[test_set])


def test_a_build_says_which_of_its_cases_look_like_one_scan(archive, test_set, small_config, tmp_path, caplog):
    """Within one build, and against what the shards hold; none is kept out, as two phases of a patient look alike."""
    build([archive], tmp_path / "out", small_config)
    assert "look like one scan" not in caplog.text
    (test_set / "one.nii.gz").unlink()
    for sources, out in (([archive, test_set], "new"), ([test_set], "out")):
        caplog.clear()
        assert build(sources, tmp_path / out, small_config).quarantined == []
        assert "1 pairs of cases look like one scan under two names, the nearest are ct-" in caplog.text


def msd(folder: Path) -> Path:
    """A test list, beside images whose labels are missing or unnamed."""
    entries = {
        "test": ["./one.nii.gz"],
        "validation": ["two.nii.gz"],
        "training": [{"image": "three.nii.gz", "label": 7}],
    }
    (folder / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "numTest": 1} | entries))
    (folder / "classes.yaml").write_text("of no use here")
    return folder / "dataset.json"


def nnunet(folder: Path) -> Path:
    for name, place in {"one": "imagesTs", "two": "imagesTr", "three": "imagesUn"}.items():
        (folder / place).mkdir()
        (folder / f"{name}.nii.gz").rename(folder / place / f"{name}_0000.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {"liver": 1}}))
    return folder


@pytest.mark.parametrize("described", [msd, nnunet])
def test_every_image_counts_that_a_list_names_in_any_role(archive, test_set, small_config, tmp_path, described):
    against = described(test_set)
    assert len(scans_of([against], in_this_process, lambda *_: None, whole=[against]).found) == 3
    result = build([archive], tmp_path / "out", small_config, exclude=[against])
    assert len(result.manifest.cases) == 1 and len(result.quarantined) == 2


def test_what_keeps_nothing_out_says_so(archive, test_set, small_config, tmp_path, capsys, caplog):
    (test_set / "dataset.json").write_text(json.dumps({"test": [], "numTest": 0}))
    for arguments in (
        ["dedup", str(archive), "--against"],
        ["build", str(archive), "--out", str(tmp_path / "o"), "--exclude"],
    ):
        assert main(["shards", *arguments, str(test_set)]) == 2
        assert "dataset.json" not in (said := capsys.readouterr().err) and "names no image; name images" in said
    (test_set / "dataset.json").write_text(json.dumps({"test": ["three.nii.gz"]}))
    assert build([archive], tmp_path / "out", small_config, exclude=[test_set]).quarantined == []
    assert "none of the 1 scans to be kept out is among these cases" in caplog.text


def test_an_image_that_is_named_and_missing_is_not_passed_over(archive, test_set, small_config, tmp_path):
    (test_set / "dataset.json").write_text(json.dumps({"test": ["gone.nii.gz"]}))
    with pytest.raises(BuildError, match=r"to be kept out cannot be read: .*gone.nii.gz: is named and is no file"):
        build([archive], tmp_path / "out", small_config, exclude=[test_set])


ROLES = st.dictionaries(
    st.sampled_from(["training", "validation", "test", "testing", "unlabelled", "held back"]),
    st.lists(st.tuples(st.sampled_from("abcde"), st.booleans(), st.sampled_from(["", "./", "p/"])), max_size=4),
)


@given(ROLES)
def test_no_role_hides_an_image(roles):
    with tempfile.TemporaryDirectory() as folder:
        written = {
            role: [
                {"image": f"{where}{name}.nii.gz"} if mapped else f"{where}{name}.nii.gz" for name, mapped, where in of
            ]
            for role, of in roles.items()
        }
        named = {os.path.join(where.strip("./"), f"{name}.nii.gz") for of in roles.values() for name, _, where in of}
        for name in named:
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).touch()
        file = Path(folder) / "list.json"
        file.write_text(json.dumps({"labels": {"1": "liver"}} | written))
        if not named:
            with pytest.raises(CaseError, match="names no image"):
                open_images(file)
            return
        cases = open_images(file).cases
        assert sorted(os.path.relpath(case.files[0], folder) for case in cases) == sorted(named)
        assert len({case.name for case in cases}) == len(named)


def test_fingerprints_of_another_version_are_refused(archive, small_config, tmp_path, capsys):
    out = tmp_path / "out"
    build([archive], out, small_config)
    table = np.load(out / "case-fingerprints.npy")[:, :100]
    np.save(out / "case-fingerprints.npy", table)
    content = json.loads((out / "manifest.json").read_text())
    content["tables"]["case-fingerprints.npy"] = table_digest(table)
    (out / "manifest.json").write_text(json.dumps(content))
    assert main(["shards", "dedup", str(out), "--against", str(out)]) == 2
    assert "fingerprints of another version; remove the folder and build the shards again" in capsys.readouterr().err
