"""What a report refuses can be mended as its message says: each cure is followed here."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from mixcl_dist.finetuning.predict import predict
from mixcl_dist.report import write_report

from ..cures import refused


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """They take most of a report's time."""
    monkeypatch.setattr("mixcl_dist.report.figures._svg", lambda *arguments: "")


@pytest.fixture
def predicted(runs, data, tmp_path):
    (tmp_path / "scan").mkdir()
    shutil.copy(data / "validation/images/validation_000.nii.gz", tmp_path / "scan")

    def into(out):
        predict(runs / "few", tmp_path / "scan", out)
        return out

    return into


def test_a_folder_that_is_none_of_them_is_exchanged_for_one(runs):
    refused("give the folder of --run, --study, or the --out of mixcl table or predict", write_report, runs)
    write_report(runs / "few")


def test_a_file_in_the_pages_place_makes_room(runs):
    (runs / "few" / "report").touch()
    place = refused("^(.*/report): File exists; make room there", write_report, runs / "few")
    (runs / "few" / "report").unlink()
    assert str(write_report(runs / "few").parent) == place


@pytest.mark.parametrize("instead", [True, False])
def test_a_link_out_of_the_folder_is_exchanged_for_the_file_or_removed(runs, tmp_path, instead):
    link, file = runs / "few" / "overlays.npz", tmp_path / "overlays.npz"
    link.rename(file)
    link.symlink_to(file)
    refused("leads out of .*; put the file itself there, or remove it", write_report, runs / "few")
    link.unlink()
    if instead:
        file.rename(link)
    write_report(runs / "few")


def a_part_is_missing(file):
    np.savez(file, image=np.zeros(3))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.write_bytes(b"damaged"), "not a whole .npz file; remove it, or move the folder away"),
        (a_part_is_missing, "'truth' is missing; remove the file, or move the folder away and make it again"),
    ],
)
def test_damaged_pictures_are_removed(runs, damage, said):
    damage(runs / "few" / "overlays.npz")
    refused(said, write_report, runs / "few")
    (runs / "few" / "overlays.npz").unlink()
    write_report(runs / "few")


@pytest.mark.parametrize("line", ['{"step": -1}', "{"])
def test_a_damaged_line_is_removed(runs, line):
    path = runs / "few" / "metrics.jsonl"
    path.write_text(path.read_text() + f"{line}\n")
    number = int(refused(r"line (\d+): .*; remove the line, or move the folder away", write_report, runs / "few"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: number - 1] + lines[number:]))
    write_report(runs / "few")


def test_damaged_scores_are_removed_and_made_again(runs, again):
    (runs / "few" / "dice.json").write_text("{}")
    refused("remove it and fine-tune again", write_report, runs / "few")
    (runs / "few" / "dice.json").unlink()
    again("few")
    write_report(runs / "few")


def test_damaged_settings_are_mended(runs):
    file = runs / "few" / "config.yaml"
    whole = file.read_text()
    file.write_text(whole.replace("steps: 2", "steps: two"))
    refused("finetune.steps .*; mend it, or move the folder away", write_report, runs / "few")
    file.write_text(whole)
    write_report(runs / "few")


def test_a_damaged_record_of_a_prediction_is_made_again_elsewhere(predicted, tmp_path):
    out = predicted(tmp_path / "out")
    (out / "prediction.json").write_text("{}")
    refused("predict again with another --out", write_report, out)
    write_report(predicted(tmp_path / "other"))


def test_a_damaged_case_of_a_prediction_is_removed_and_predicted_again(predicted, tmp_path):
    out = predicted(tmp_path / "out")
    (case,) = (out / "cases").iterdir()
    case.write_text("{}")
    refused("remove it and predict again", write_report, out)
    case.unlink()
    write_report(predicted(out))


def test_a_name_that_is_none_is_predicted_again(predicted, tmp_path):
    out = predicted(tmp_path / "out")
    record = json.loads((out / "prediction.json").read_text())
    (out / "prediction.json").write_text(json.dumps(record | {"cases": ["../patient"]}))
    refused("prediction.json: '../patient' is no name of a case; predict again", write_report, out)
    write_report(predicted(out))
