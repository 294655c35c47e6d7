"""One segmentation trial through the real code, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mixcl_dist.budget import budget_cases
from mixcl_dist.config import Config, ConfigError, load, replace
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.sources import Case, open_source
from mixcl_dist.errors import RunError
from mixcl_dist.finetuning.finetune import finetune, mean_dice
from mixcl_dist.finetuning.segmenter import SegmentationNetwork
from mixcl_dist.finetuning.start import initial_network
from mixcl_dist.finetuning.task import Task, open_task
from mixcl_dist.phantom import CLASSES
from mixcl_dist.records import DiceRecord
from mixcl_dist.report import write_report
from mixcl_dist.seen import KnownScans, Seen
from mixcl_dist.settings import BudgetConfig

SMALL = {
    "network.filters": [4, 8, 8],
    "finetune.steps": 3,
    "finetune.batch_size": 1,
    "finetune.patch_size": [24, 24, 24],
    "finetune.log_every": 1,
    "budget.fraction": 0.5,
}


@pytest.fixture(scope="module")
def config():
    return replace(Config(), SMALL)


@pytest.fixture(scope="module")
def budgeted(data):
    return budget_cases(open_source(data).cases, BudgetConfig(0.5))


@pytest.fixture(scope="module")
def trial(config, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "scratch"
    return run, finetune(config, data=data, start=None, run=run)


def pretrained(folder, config, *, data=None, label_cases=(), classes=CLASSES, training_cases=(), spacing_mm=None):
    """The folder that pre-training on cases of `data` leaves, with a backbone of known weights."""
    folder.mkdir()
    torch.manual_seed(7)
    backbone = SegmentationNetwork(config.network, 1).backbone
    save_file(backbone.state_dict(), folder / "network.safetensors")
    network = {key: getattr(config.network, key) for key in ("architecture", "filters", "window_hu")}
    (folder / "network.json").write_text(json.dumps(network | {"spacing_mm": spacing_mm, "classes": []}))
    facts = {"kind": "pretrain", "name": folder.name, "finished": "2026-01-01", "label_cases": []}
    (folder / "run.json").write_text(json.dumps(facts))
    names = {*label_cases, *training_cases}
    cases = [case for case in open_source(data).cases if case.name in names] if names else []
    labels = [frozenset(case.reliable if case.name in label_cases else ()).intersection(classes) for case in cases]
    Seen(tuple(KnownScans(folder).of(cases)), tuple(labels)).save(folder)
    return folder


def test_a_trial_leaves_what_report_and_export_read(trial, budgeted):
    run, dice = trial
    assert dice == DiceRecord.load(run)
    assert list(dice.classes) == list(CLASSES) and list(dice.cases) == ["validation_000"]
    facts = json.loads((run / "run.json").read_text())
    assert facts["kind"] == "finetune" and facts["start"] is None and facts["start_name"] == "scratch"
    assert facts["label_cases"] == budgeted and facts["validation_cases"] == ["validation_000"]
    assert facts["scored"] == "validation" and facts["scored_cases"] == ["validation_000"]
    assert facts["finished"] and facts["seconds"] > 0
    assert facts["arithmetic"] in ("float32", "bfloat16 autocast, float32 master weights")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert set(steps[0]) == {"step", "seconds", "loss", "learning_rate"}
    overlays = np.load(run / "overlays.npz")
    assert overlays["truth"].shape == (1, 36, 30) and overlays["truth"].any()


@pytest.fixture(scope="module")
def kept_back(data, budgeted):
    """A labelled training case outside the budget, to choose on."""
    return next(case.name for case in open_source(data).cases if case.split == "training" and case.name not in budgeted)


def test_choices_are_scored_on_development_cases_and_only_a_final_figure_on_validation(
    config, data, kept_back, tmp_path
):
    choosing = replace(config, {"budget.development": [kept_back], "finetune.steps": 1})
    for final, scored, names in ((False, "development", [kept_back]), (True, "validation", ["validation_000"])):
        run = tmp_path / scored
        dice = finetune(choosing, data=data, start=None, run=run, final=final)
        facts = json.loads((run / "run.json").read_text())
        assert list(dice.cases) == facts["scored_cases"] == names
        assert dice.scored == facts["scored"] == scored
        assert kept_back not in facts["label_cases"]


def test_the_saved_network_is_the_one_that_was_scored(trial, config):
    run, _ = trial
    network = SegmentationNetwork(config.network, len(CLASSES))
    network.load_state_dict(load_file(run / "model.safetensors"))
    facts = json.loads((run / "network.json").read_text())
    assert facts["classes"] == list(CLASSES) and facts["filters"] == [4, 8, 8]


def test_the_same_trial_again_has_the_same_losses(trial, config, data, tmp_path):
    run, _ = trial
    finetune(config, data=data, start=None, run=tmp_path / "again")
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, tmp_path / "again")
    ]
    assert losses[0] == losses[1]


def test_a_trial_that_was_interrupted_goes_on_to_the_very_result(config, data, tmp_path):
    training = [case.name for case in open_source(data).cases if case.split == "training"]
    settings = {"finetune.steps": 4, "finetune.curve_every": 2, "budget.development": training[:1]}
    long = replace(config, settings | {"budget.fraction": 1.0})
    whole, told = [], []
    finetune(long, data=data, start=None, run=tmp_path / "whole", report=lambda *point: whole.append(point))

    class Killed(BaseException):
        pass

    def report(*point):
        told.append(point)
        if len(told) == 1:
            raise Killed

    parts = {"data": data, "start": None, "run": tmp_path / "parts", "resume": True, "report": report}
    with pytest.raises(Killed):
        finetune(long, **parts)
    shutil.copytree(tmp_path / "parts", tmp_path / "broken")
    (tmp_path / "broken" / "unfinished.pt").write_bytes(b"no checkpoint")
    with pytest.raises(RunError, match=r"unfinished.pt: cannot be gone on from \(.*\); remove it to begin") as refused:
        finetune(long, **(parts | {"run": tmp_path / "broken"}))
    assert "\n" not in str(refused.value)
    finetune(long, **parts)
    assert told == [whole[0], *whole] and [step for step, _ in whole] == [2, 4]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert DiceRecord.load(tmp_path / "whole") == DiceRecord.load(tmp_path / "parts")
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4] and not (tmp_path / "parts" / "unfinished.pt").exists()


def test_a_start_gives_weights_architecture_and_spacing(config, data, tmp_path):
    start = pretrained(tmp_path / "pretrained", config, spacing_mm=[12.0, 12.0, 12.0])
    other = replace(config, {"network.filters": [6, 8, 8], "finetune.learning_rate": 1e-12})
    run = tmp_path / "run"
    finetune(other, data=data, start=start, run=run)
    facts = json.loads((run / "network.json").read_text())
    assert facts["filters"] == [4, 8, 8] and facts["spacing_mm"] == [12.0, 12.0, 12.0]
    begun, ended = load_file(start / "network.safetensors"), load_file(run / "model.safetensors")
    for name, weight in begun.items():
        torch.testing.assert_close(ended[f"backbone.{name}"], weight, rtol=1e-5, atol=1e-6)


def test_a_start_that_knows_withheld_labels_is_refused(config, data, budgeted, tmp_path):
    withheld = next(
        case.name for case in open_source(data).cases if case.split == "training" and case.name not in budgeted
    )
    start = pretrained(tmp_path / "leaky", config, data=data, label_cases=[*budgeted, withheld])
    with pytest.raises(RunError, match=f"leaky: .*{withheld}.*--budget.fraction"):
        finetune(config, data=data, start=start, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_start_that_saw_validation_images_is_refused(config, data, tmp_path):
    start = pretrained(tmp_path / "leaky", config, data=data, training_cases=["validation_000"])
    with pytest.raises(RunError, match="validation case validation_000"):
        finetune(config, data=data, start=start, run=tmp_path / "run")


def test_a_supervised_start_gives_its_backbone_and_its_labels_count(trial, config, data, budgeted, tmp_path):
    start, _ = trial
    again = replace(config, {"finetune.learning_rate": 1e-12, "finetune.steps": 1})
    finetune(again, data=data, start=start, run=tmp_path / "run")
    begun, ended = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "run"))
    for name, weight in begun.items():
        if name.startswith("backbone."):
            torch.testing.assert_close(ended[name], weight, rtol=1e-5, atol=1e-6)
    other = replace(config, {"budget.seed": 1, "budget.scans": 1, "budget.fraction": 0.0})
    assert budget_cases(open_source(data).cases, other.budget) != budgeted
    with pytest.raises(RunError, match=r"labels of case .* outside the trial's budget of 1"):
        finetune(other, data=data, start=start, run=tmp_path / "leaky")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert sorted(facts["training_cases"]) == sorted(budgeted)


def test_only_the_chosen_classes_are_learnt_and_scored(config, data, tmp_path):
    chosen = {"finetune.classes": ["aorta", "liver"], "budget.fraction": 1.0, "finetune.steps": 1}
    dice = finetune(replace(config, chosen), data=data, start=None, run=tmp_path / "run")
    assert list(dice.classes) == ["liver", "aorta"]
    seen = Seen.load(tmp_path / "run")
    assert set().union(*seen.labels) == {"liver", "aorta"}
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert len(weights["classifier.bias"]) == 3


def test_a_hidden_class_is_background_that_nobody_annotated(data):
    task = open_task(data, replace(Config(), {"budget.classes": ["spleen"]}))
    case = next(case for case in task.cases if "spleen" in case.reliable)
    label = np.arange(len(task.catalogue.classes) + 1, dtype=np.uint8)
    spleen = task.catalogue.index("spleen")
    np.testing.assert_array_equal(task.target(case, label), label == spleen)
    np.testing.assert_array_equal(task.known(case), [False, True])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"finetune.classes": ["heart"]}, r"finetune.classes: no label of heart may be read; choose among liver, "),
        (
            {"budget.classes": ["liver"], "finetune.classes": ["aorta"]},
            r"finetune.classes: no label of aorta may be read; choose among liver$",
        ),
    ],
)
def test_classes_that_may_not_be_learnt_are_refused(config, data, tmp_path, settings, said):
    with pytest.raises(ConfigError, match=said):
        finetune(replace(config, settings), data=data, start=None, run=tmp_path / "run")


def test_a_start_that_read_other_organs_of_all_scans_is_lawful(config, data, tmp_path):
    """Known organs are labelled everywhere, new ones are learnt from one scan."""
    training = [case.name for case in open_source(data).cases if case.split == "training"]
    known, new = ["liver", "vertebrae"], ["spleen"]
    start = pretrained(tmp_path / "known", config, data=data, label_cases=training, classes=known)
    one = {"budget.fraction": 0.0, "budget.scans": 1, "finetune.steps": 1}
    trial = replace(config, one | {"finetune.classes": new})
    finetune(trial, data=data, start=start, run=tmp_path / "run")
    every = pretrained(tmp_path / "every", config, data=data, label_cases=training)
    with pytest.raises(RunError, match=r"every: was trained with the labels .* spleen first, outside .* budget of 1"):
        finetune(trial, data=data, start=every, run=tmp_path / "leaky")
    with pytest.raises(RunError, match=r"known: was trained with the labels"):
        finetune(replace(config, one), data=data, start=start, run=tmp_path / "leaky")


@pytest.mark.slow
def test_a_start_with_a_patient_who_only_looks_like_a_validation_case_is_taken_as_its_refusal_says(
    config, data, tmp_path
):
    """By `budget.distinct_patients`, which the run's record, its warning and its page then show."""
    start, one = pretrained(tmp_path / "start", config), replace(config, {"finetune.steps": 1})
    (held_out,) = KnownScans(start).of([case for case in open_source(data).cases if case.split == "validation"])
    Seen((held_out._replace(name="other", digest="of other voxels"),), (frozenset(),)).save(start)
    with pytest.raises(RunError, match=r"case validation_000 \(there other, distance 0\.0000") as refused:
        finetune(one, data=data, start=start, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (words,) = re.findall(r"--budget.distinct_patients (.*)$", str(refused.value))
    told = [("budget.distinct_patients", *shlex.split(words))]
    given = replace(one, {"budget.distinct_patients": load(overrides=told).budget.distinct_patients})
    finetune(given, data=data, start=start, run=tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (pair,) = facts["distinct_patients"]
    assert pair[:2] == ["validation_000", "other"] and "validation_000" not in facts["start_saw"]
    page = write_report(tmp_path / "run").read_text()
    assert "count as two patients by budget.distinct_patients: validation_000 and other (0.0000)" in page


def test_a_class_that_no_labelled_case_shows_is_named_and_left_out_of_the_mean(config, data, tmp_path, capsys):
    one = replace(config, {"budget.fraction": 0.0, "budget.scans": 1, "finetune.steps": 1})
    dice = finetune(one, data=data, start=None, run=tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (case,) = (case for case in open_source(data).cases if case.name == facts["label_cases"][0])
    unshown = [name for name in CLASSES if name not in case.reliable]  # a phantom shows all that it annotates
    assert facts["unshown_classes"] == unshown != []
    assert f"no labelled case shows {', '.join(unshown)}: left out of the mean" in capsys.readouterr().err
    shown = [value for name, value in dice.class_mean.items() if name in case.reliable and value is not None]
    assert dice.mean == pytest.approx(np.mean(shown))
    assert mean_dice({"a": 0.4, "b": 0.0, "c": 0.8, "d": None}, ["c"]) == pytest.approx(0.2)
    assert mean_dice({"a": None, "c": 0.8}, ["c"]) is None


def test_weights_that_do_not_fit_are_refused_in_one_line(config, tmp_path):
    start = pretrained(tmp_path / "pretrained", config)
    other = replace(config, {"network.filters": [6, 8, 8]})
    with pytest.raises(RunError, match="move the folder away and make it again") as refusal:
        initial_network(other, start, 2)
    assert "\n" not in str(refusal.value)


def test_a_loss_that_is_lost_ends_the_trial_in_one_line(config, data, tmp_path):
    run = tmp_path / "lost"
    hopeless = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, learning_rate=1e30))
    with pytest.raises(RunError, match=r"lost: the loss is nan at step \d; lower finetune\.learning_rate") as refusal:
        finetune(hopeless, data=data, start=None, run=run)
    assert "\n" not in str(refusal.value)
    assert not (run / "dice.json").exists()


def test_a_finished_trial_is_not_overwritten(trial, config, data):
    with pytest.raises(RunError, match="finished trial"):
        finetune(config, data=data, start=None, run=trial[0])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("budget.fraction", 0.0, "give --scans or --labels"),
        ("budget.development", ["nobody"], "no case nobody"),
        ("budget.development", ["validation_000"], "validation_000 is in the validation split"),
        ("finetune.patch_size", [24, 24, 22], "multiple of 4"),
        ("finetune.patch_size", [4, 4, 4], "not all 4 x 4 x 4; try 4,4,8"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, data, tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message):
        finetune(replace(config, {key: value}), data=data, start=None, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_doubtful_and_never_learnt_classes_become_background(tmp_path):
    case = Case(
        name="x",
        dataset="d",
        split="training",
        format="nifti",
        files=(),
        annotated=("liver", "spleen"),
        doubtful=("spleen",),
    )
    task = Task((case,), Catalogue(("aorta", "liver", "spleen")), ("liver", "spleen"))
    np.testing.assert_array_equal(task.target(case, np.array([0, 1, 2, 3], dtype=np.uint8)), [0, 0, 1, 0])
    np.testing.assert_array_equal(task.known(case), [False, True, False])


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"kind": "study", "finished": "2026-01-01"}, "kind is 'study', not pretrain or finetune"),
        ({"kind": "finetune", "finished": None}, "has not finished; give its mixcl finetune command again"),
        ({"kind": "pretrain", "finished": None}, "has not finished"),
    ],
)
def test_only_a_finished_run_is_a_start(config, data, tmp_path, facts, said):
    start = tmp_path / "start"
    start.mkdir()
    (start / "run.json").write_text(json.dumps(facts | {"name": "start", "label_cases": []}))
    with pytest.raises(RunError, match=said):
        finetune(config, data=data, start=start, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
