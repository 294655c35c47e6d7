"""A model card shows the few-label table or study in which the network was compared, with its intervals."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from scipy import stats

from mixcl_dist.cli import main
from mixcl_dist.export import export
from mixcl_dist.export.comparison import compared
from mixcl_dist.jsonfiles import write_json

from ..cures import refused
from ..tables import dice_of, write_table

SCRATCH, PRETRAINED = (0.50, 0.55, 0.45), (0.60, 0.64, 0.58)


def write_study(folder, start, scratch=SCRATCH, pretrained=PRETRAINED):
    """Of one share of labels, with these Dice by seed."""
    arms = {"scratch": scratch, "pretrained": pretrained}
    trials = [
        {"id": f"{arm}-s{seed}", "start": arm, "fraction": 0.5, "seed": seed, "run": f"trials/{arm}-s{seed}"}
        | {"status": "done", "mean": dice, "class_mean": {"liver": dice}}
        for arm, values in arms.items()
        for seed, dice in enumerate(values)
    ]
    folder.mkdir()
    starts = [{"name": "pre", "path": str(start)}, "scratch"]
    study = {"kind": "study", "name": "a study", "scored": "development", "starts": starts, "trials": trials}
    write_json(folder / "study.json", study)
    return folder


def section(out):
    """The lines of the card's section, those of its table without the head."""
    card = next(file for file in (out / "README.md", out / "docs" / "README.md") if file.is_file()).read_text()
    text = card.partition("## Few labels\n")[2].partition("\n## ")[0]
    return text, [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]


def test_a_network_of_a_table_is_exported_with_what_the_table_found(runs, tmp_path):
    """Without being asked for: it lies in the table."""
    table = write_table(tmp_path / "table")
    shutil.copytree(runs / "pre", table / "pretrain" / "mixcl-n1-s0")
    text, lines = section(export(table / "pretrain" / "mixcl-n1-s0", "hf", tmp_path / "out"))
    assert {(scans, arm, trials) for scans, arm, trials, *_ in lines} == {
        (scans, arm, "5 of 5") for scans in "14" for arm in ("scratch", "mixcl", "reconstruction")
    }
    (gain,) = (gain for scans, arm, *_, gain in lines if (scans, arm) == ("1", "mixcl"))
    mean = np.mean([dice_of("mixcl", 1, seed)["mean"] - dice_of("scratch", 1, seed)["mean"] for seed in range(5)])
    assert re.fullmatch(rf"\+{100 * mean:.1f} \(\+\d+\.\d to \+\d+\.\d\)", gain)
    assert "few-label table “few labels”" in text and "This network is its pretrain/mixcl-n1-s0." in text
    assert "5 subset seeds and 12 cases" in text


def test_every_form_of_export_shows_it(runs, tmp_path):
    study = write_study(tmp_path / "study", runs / "pre")
    shown = [
        section(export(runs / name, to, tmp_path / to, table=study))[1]
        for name, to in (("pre", "monai"), ("pre", "nnunet"), ("few", "bundle"), ("few", "hf"))
    ]
    assert len(shown[0]) == 2 and all(lines == shown[0] for lines in shown)


def test_of_a_study_the_gain_has_students_interval_of_its_pairs(runs, tmp_path):
    study = write_study(tmp_path / "study", runs / "pre")
    text, lines = section(export(runs / "pre", "monai", tmp_path / "out", table=study))
    differences = 100 * np.subtract(PRETRAINED, SCRATCH)
    low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    assert lines == [
        ["50 %", "scratch", "3", "50.0 ± 5.0", "–"],
        ["50 %", "pretrained", "3", "60.7 ± 3.1", f"+{differences.mean():.1f} (+{low:.1f} to +{high:.1f})"],
    ]
    assert "This network is its start pre." in text and "development cases" in text


def test_what_is_fine_tuned_from_a_start_of_the_study_says_so(runs, tmp_path):
    study = write_study(tmp_path / "study", runs / "pre")
    text, _ = section(export(runs / "few", "monai", tmp_path / "out", table=study))
    assert "This network began from its start pre." in text


def test_a_copy_is_known_by_its_weights_and_a_network_of_other_weights_is_not(runs, tmp_path):
    study = write_study(tmp_path / "study", runs / "pre")
    copied = shutil.copytree(runs / "pre", tmp_path / "copied")
    assert compared(copied, study).role == "This network is its start pre."
    network = json.loads((copied / "network.json").read_text())
    (copied / "network.json").write_text(json.dumps(network | {"digests": {"network.safetensors": "0" * 64}}))
    refused("neither .*copied nor what it began from", compared, copied, study)


def test_a_run_beside_nothing_has_no_such_section(runs, tmp_path):
    assert "Few labels" not in (export(runs / "pre", "monai", tmp_path / "out") / "README.md").read_text()


def test_a_run_in_a_table_without_a_finished_trial_has_none_either(runs, tmp_path):
    table = write_table(tmp_path / "table", done=lambda item: False)
    run = shutil.copytree(runs / "pre", table / "pretrain" / "identity")
    assert compared(run, None) is None
    refused("no trial has finished; give its command again, or leave --table out", compared, run, table)


def test_another_folder_is_exchanged_for_the_one_that_compares_the_run(runs, tmp_path):
    other = write_study(tmp_path / "other", tmp_path / "elsewhere")
    study = write_study(tmp_path / "study", runs / "pre")
    cure = "give the one that compares it, or leave --table out"
    refused(cure, export, runs / "pre", "monai", tmp_path / "out", table=other)
    refused("give the --out of mixcl table or --study of tune", compared, runs / "pre", runs / "few")
    assert not (tmp_path / "out").exists()
    words = ["export", str(runs / "pre"), "--to", "monai", "--out", str(tmp_path / "out")]
    assert main([*words, "--table", str(study)]) == 0


@pytest.mark.parametrize("name", ["<script>x</script>", "| x |", "[x](javascript:x)"])
def test_a_strangers_name_is_text(runs, tmp_path, name):
    study = write_study(tmp_path / "study", runs / "pre")
    facts = json.loads((study / "study.json").read_text())
    (study / "study.json").write_text(json.dumps(facts | {"name": name}))
    text, lines = section(export(runs / "pre", "monai", tmp_path / "out", table=study))
    assert len(lines) == 2 and "<" not in text and not re.search(r"(?<!\\)[\[\]]", text)
