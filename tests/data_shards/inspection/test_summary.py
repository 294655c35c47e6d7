"""Summary and picture: what is shown is what the shards hold."""

from __future__ import annotations

import json
import re

import matplotlib.image
import numpy as np
import pytest

from mixcl_dist.cli import main
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.building.processes import in_this_process
from mixcl_dist.data_shards.building.settings import BuildConfig
from mixcl_dist.data_shards.format.manifest import CASES_FILE, Manifest
from mixcl_dist.data_shards.inspection import picture
from mixcl_dist.data_shards.inspection.picture import contact_sheet
from mixcl_dist.data_shards.inspection.summary import inspect, table


def test_inspect_counts_what_is_on_disk(built):
    summary = inspect(built)
    indices = [json.loads(path.read_text())["samples"] for path in built.glob("*.index.json")]
    keys = [key for index in indices for key in index]
    assert summary["patches"] == len(keys) > 20
    assert summary["shards"] == len(list(built.glob("*.tar")))
    assert summary["bytes"] == sum(path.stat().st_size for path in built.glob("*.tar"))
    assert summary["bytes_per_voxel"] == pytest.approx(summary["bytes"] / len(keys) / 16**3)
    groups = {group["split"]: group for group in summary["datasets"]}
    training = groups["training"]
    assert (training["cases"], training["labelled"], training["faces"]) == (2, 2, 0)
    assert groups["unlabelled"]["patches"] == sum(key.startswith(("c_", "d_", "e_")) for key in keys)
    np.testing.assert_allclose(summary["spacing_range_mm"], [(2, 2), (2, 2), (3, 3)])
    assert json.dumps(summary), "plain values"


def test_the_table_shows_every_count(built):
    summary, lines = inspect(built), table(inspect(built)).splitlines()
    assert (
        lines[0] == f"5 cases, {summary['patches']} patches in {summary['shards']} shards, digest {summary['digest']}"
    )
    training, unlabelled = (
        next(line for line in lines if f" {split} " in line) for split in ("training", "unlabelled")
    )
    assert training.split()[-4:-1] == ["2", "2", "0"] and unlabelled.split()[-4:-1] == ["3", "0", "0"]
    assert any(re.fullmatch(r"1 +core +2", line) for line in lines)
    assert any(re.fullmatch(r"2 to 3 +5 +5 +0", line) for line in lines)
    shares = [float(line.split("%")[0].split()[-1]) for line in lines if re.match(r" *-?\d+ to +-?\d+ +[\d.]+%", line)]
    assert len(shares) == 16 and sum(shares) == pytest.approx(100, abs=0.1)


def test_the_verb_writes_a_picture_of_different_cases(built, tmp_path, capsys, monkeypatch):
    drawn = []
    draw = picture._draw
    monkeypatch.setattr(
        picture, "_draw", lambda axis, patch, window: (drawn.append((patch, window)), draw(axis, patch, window))[1]
    )
    assert (
        main(["shards", "inspect", str(built), "--picture", str(tmp_path / "sheet.png"), "--window", "-200", "200"])
        == 0
    )
    assert f"picture in {tmp_path / 'sheet.png'}" in capsys.readouterr().out
    assert sorted(patch.key.rpartition("_")[0] for patch, _ in drawn) == ["a", "b", "c", "d", "e"]
    assert {tuple(window) for _, window in drawn} == {(-200.0, 200.0)}
    for patch, _ in drawn:
        assert (patch.label is not None) == (patch.key[0] in "ab") and patch.spacing_mm == [2, 2, 3]
        if patch.label is not None:
            assert patch.label.any(), "of a labelled case, a patch with a class in it is shown"
    image = matplotlib.image.imread(tmp_path / "sheet.png")
    assert image.shape[0] > 200 and image.shape[1] > 1000 and len(np.unique(image)) > 20


def test_of_many_cases_some_are_shown_from_first_to_last(built, monkeypatch):
    monkeypatch.setattr(picture, "PICTURES", 3)
    manifest = Manifest.load(built)
    cases = np.load(built / CASES_FILE)[picture._spread(built, manifest)]
    np.testing.assert_array_equal(cases, [0, 2, 4])


def test_the_picture_has_the_patients_right_on_the_left_and_anterior_above(built):
    """A patch with one bright quarter, drawn: where does it lie?"""
    hu = np.full((16, 16, 16), -150, np.int16)
    hu[8:, 8:] = 240  # right, anterior
    figure = picture.Figure(figsize=(2, 2), dpi=100)
    picture.FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    picture._draw(axis, picture._Patch("k", hu, None, (1.0, 1.0, 1.0)), (-160, 240))
    axis.set_title("")
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., 0]
    quarters = {
        where: pixels[y, x]
        for where, (y, x) in {"left above": (50, 50), "right below": (150, 150), "right above": (50, 150)}.items()
    }
    assert quarters["left above"] > 200 and quarters["right below"] < 30 and quarters["right above"] < 30


def test_a_sheet_of_real_shards(ct, tmp_path):
    config = BuildConfig(patch_size=(64, 64, 32), codec="small")
    assert build([ct / "torso"], tmp_path / "out", config, run=in_this_process).quarantined == []
    contact_sheet(tmp_path / "out", tmp_path / "sheet.png", (-160, 240))
    assert matplotlib.image.imread(tmp_path / "sheet.png")[..., :3].std() > 0.05
