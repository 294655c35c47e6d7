"""Folders may be called after patients: what is passed on (shards, pages, exports) has none of their names.

`.build/quarantine.jsonl`, messages and the records of runs do name files, or nobody could find them: they stay where
the data is.
"""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from mixcl_dist.config import replace
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.export import export
from mixcl_dist.finetuning.finetune import finetune
from mixcl_dist.phantom import write_cohort
from mixcl_dist.pretraining.pretrain import pretrain
from mixcl_dist.report import write_report
from mixcl_dist.studies import study as study_module
from mixcl_dist.studies.study import run_study

pytestmark = pytest.mark.slow
PATIENT = "Zimmerova-Ludmila"
STEPS = {"pretrain.steps": 1, "finetune.steps": 1, "study.fractions": [1.0], "study.seeds": [0]}


def told_in(folder: Path) -> list[Path]:
    """Files below `folder`, but for what a build keeps for itself, that hold the name, in content or name."""
    forms = [PATIENT.encode(), PATIENT.encode("utf-16-le"), base64.b64encode(PATIENT.encode())[:-2]]
    files = [path for path in folder.rglob("*") if path.is_file() and ".build" not in path.relative_to(folder).parts]
    assert files
    return [
        file
        for file in files
        if PATIENT in str(file.relative_to(folder)) or any(form in file.read_bytes() for form in forms)
    ]


def _at_once(function, trials, *, ended, reported, **options):
    for trial in trials:
        ended(study_module.Outcome(trial, function(trial, lambda figures, trial=trial: reported(trial, figures))))


@pytest.fixture(scope="module")
def home(tmp_path_factory, small_config) -> Path:
    """A folder called after a patient, with a data set, scans called so, too, and what the verbs make of them there."""
    home = tmp_path_factory.mktemp("home") / PATIENT
    data, archive = write_cohort(home / "ct", training=4, validation=1, unlabelled=2, size=(36, 30, 36), spacing_mm=10)
    scans = home / f"{PATIENT} 1961-02-03"
    scans.mkdir()
    for number, image in enumerate(sorted(archive.rglob("images/*.nii.gz"))):
        image.rename(scans / f"{PATIENT}-{number}.nii.gz")
    (scans / f"{PATIENT}.nii.gz").write_bytes(b"broken")
    config = replace(small_config, STEPS)
    refused = build([data, scans], home / "shards", config.build).quarantined
    assert [PATIENT in str(problem) for problem in refused] == [True]
    labels = {"budget.fraction": 1.0}
    pretrain(replace(config, labels), shards=home / "shards", run=home / "pre")
    finetune(replace(config, labels), data=data, start=home / "pre", run=home / "few")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, "run_trials", _at_once)
        run_study(config, data=data, starts=[home / "pre"], study=home / "study")
    return home


def test_shards_have_no_name_of_a_path(home):
    assert told_in(home / "shards") == []
    assert PATIENT in (home / "shards/.build/quarantine.jsonl").read_text()


@pytest.mark.parametrize("made", ["pre", "few", "study"])
def test_a_page_has_none(home, made):
    write_report(home / made)
    assert told_in(home / made / "report") == []


@pytest.mark.parametrize(
    ("run", "to"),
    [("pre", "monai"), ("pre", "nnunet"), ("pre", "hf"), ("few", "monai"), ("few", "bundle"), ("few", "hf")],
)
def test_an_export_has_none(home, tmp_path, run, to):
    assert told_in(export(home / run, to, tmp_path / "out")) == []
