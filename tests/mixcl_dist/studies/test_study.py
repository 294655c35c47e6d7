"""The table of trials: which there are, where each may start from, and going on after an interruption."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
from safetensors.torch import save_file

from mixcl_dist.budget import budget_cases
from mixcl_dist.cluster.packing import GpuMemory
from mixcl_dist.cluster.trials import Outcome
from mixcl_dist.config import Config, ConfigError, replace, to_dict
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.data_shards.sources import open_source
from mixcl_dist.errors import RunError
from mixcl_dist.export import export
from mixcl_dist.finetuning.finetune import finetune
from mixcl_dist.finetuning.segmenter import SegmentationNetwork
from mixcl_dist.finetuning.task import open_task
from mixcl_dist.records import DiceRecord, FinetuneRecord, PretrainRecord, StudyRecord
from mixcl_dist.report import study_table, write_report
from mixcl_dist.seen import KnownScans, Seen
from mixcl_dist.settings import BudgetConfig
from mixcl_dist.studies import study as study_module
from mixcl_dist.studies.ledger import Ledger
from mixcl_dist.studies.pipeline import Pretrainings
from mixcl_dist.studies.search import check_search
from mixcl_dist.studies.study import plan, run_study
from mixcl_dist.studies.trial import run_trial
from mixcl_dist.studies.watching import standing

SMALL = {
    "network.filters": [4, 8, 8],
    "finetune.steps": 2,
    "finetune.batch_size": 1,
    "finetune.patch_size": [24, 24, 24],
    "study.fractions": [0.5, 1.0],
    "study.seeds": [0],
}


@pytest.fixture(scope="module")
def config():
    return replace(Config(), SMALL)


@pytest.fixture
def known(tmp_path):
    return KnownScans(tmp_path)


@pytest.fixture
def start(config, data, known, tmp_path):
    """A function that makes a finished pre-training run, which knew the labels of a budget."""

    def make(name, fraction, seed, filters=(4, 8, 8)):
        folder = tmp_path / name
        folder.mkdir()
        network = replace(config, {"network.filters": list(filters)}).network
        save_file(SegmentationNetwork(network, 1).backbone.state_dict(), folder / "network.safetensors")
        facts = {key: getattr(network, key) for key in ("architecture", "filters", "window_hu")}
        (folder / "network.json").write_text(json.dumps(facts | {"spacing_mm": None, "classes": []}))
        PretrainRecord(name=name, finished="2026-01-01", label_cases=()).save(folder)
        label_cases = budget_cases(open_source(data).cases, BudgetConfig(fraction, seed))
        cases = [case for case in open_source(data).cases if case.name in label_cases]
        Seen(tuple(known.of(cases)), tuple(frozenset(case.reliable) for case in cases)).save(folder)
        return folder

    return make


@pytest.fixture
def at_once(monkeypatch):
    """Trials run in this process one after the other; returns the ids that were run. Those named fail."""
    ran, broken = [], set()

    def run_trials(function, trials, *, storage, ended, reported, **options):
        for trial in trials:
            ran.append(trial["id"])
            if trial["id"] in broken:
                ended(Outcome(trial, error="OSError: disk full"))
            else:
                ended(Outcome(trial, function(trial, lambda figures, trial=trial: reported(trial, figures))))

    monkeypatch.setattr(study_module, "run_trials", run_trials)
    return ran, broken


def test_a_study_runs_the_table_and_writes_it_down(config, data, start, at_once, tmp_path, capsys):
    content = run_study(config, data=data, starts=[start("small", 0.5, 0)], study=tmp_path / "study")
    assert content == StudyRecord.load(tmp_path / "study")
    rows = {row.id: row for row in content.trials}
    assert list(rows) == ["scratch-0.5-s0", "pretrained-0.5-s0", "scratch-1-s0", "pretrained-1-s0"]
    assert {row.status for row in rows.values()} == {"done"} and content.finished
    assert rows["pretrained-1-s0"].start == "pretrained" and rows["scratch-1-s0"].start == "scratch"
    dice = json.loads((tmp_path / "study" / rows["scratch-1-s0"].run / "dice.json").read_text())
    assert rows["scratch-1-s0"].mean == dice["mean"]
    assert "pretrained-1-s0: Dice" in capsys.readouterr().err


def test_a_search_chooses_on_development_cases(config, data, at_once, tmp_path):
    training = [case.name for case in open_source(data).cases if case.split == "training"]
    choosing = {"budget.development": training[:1], "study.fractions": [1.0], "finetune.steps": 1}
    content = run_study(replace(config, choosing), data=data, starts=[], study=tmp_path / "study")
    assert content.scored == "development"
    dice = json.loads((tmp_path / "study" / content.trials[0].run / "dice.json").read_text())
    assert list(dice["cases"]) == training[:1]


def test_a_search_that_would_choose_on_validation_cases_is_refused(config, data, at_once, tmp_path):
    searched = replace(config, {"study.search": {"finetune.learning_rate": {"grid": [1e-3, 1e-2]}}})
    with pytest.raises(ConfigError, match=r"study.search: .* validation scans; .*budget.development"):
        run_study(searched, data=data, starts=[], study=tmp_path / "study")
    assert at_once[0] == [] and not (tmp_path / "study").exists()


@pytest.fixture
def controls(data, tmp_path):
    """The data set with validation scans that show none of its classes."""
    folder = tmp_path / "controls"
    shutil.copytree(data, folder)
    for case in open_source(folder).cases:
        if case.split == "validation":
            (path,) = case.labels
            image = nib.load(path)
            nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), path)
    return folder


def test_a_trial_with_nothing_to_average_is_done(config, controls, at_once, tmp_path, capsys):
    content = run_study(config, data=controls, starts=[], study=tmp_path / "study")
    assert [(row.status, row.mean, row.error) for row in content.trials] == [("done", None, None)] * 2
    assert "scratch-1-s0: Dice – (2/2 trials" in capsys.readouterr().err
    assert "–" in study_table(tmp_path / "study") and "No trial" in write_report(tmp_path / "study").read_text()
    trial = tmp_path / "study" / "trials" / "scratch-1-s0"
    assert "Mean Dice – %" in write_report(trial).read_text()
    assert "Not scored" in (export(trial, "monai", tmp_path / "out") / "README.md").read_text()
    assert run_study(config, data=controls, starts=[], study=tmp_path / "study").trials == content.trials
    assert at_once[0] == ["scratch-0.5-s0", "scratch-1-s0"]


def test_a_trial_that_is_started_again_after_it_has_finished_is_done(config, data, at_once, tmp_path):
    """As Ray does where the process ends between the last file and the report of it."""
    content = run_study(config, data=data, starts=[], study=tmp_path / "study")
    trial = {"id": "scratch-1-s0", "fraction": 1.0, "seed": 0, "start": None, "params": {}}
    again = run_trial(to_dict(config), data, tmp_path / "study", trial, pytest.fail)
    assert again["mean"] == content.trials[1].mean
    assert DiceRecord.load(tmp_path / "study" / "trials" / "scratch-1-s0").mean == content.trials[1].mean


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget.seed": 1}, "budget.seed"),
        ({"budget.fraction": 0.5}, "budget.fraction"),
        ({"finetune.steps": 1}, "finetune.steps"),
    ],
)
def test_a_folder_of_another_trial_is_not_counted(config, data, at_once, tmp_path, settings, said):
    """Copied by hand, or left by a study that had the folder before."""
    other = replace(config, {"budget.fraction": 1.0, "finetune.steps": 2} | settings)
    finetune(other, data=data, start=None, run=tmp_path / "study" / "trials" / "scratch-1-s0")
    with pytest.raises(RunError, match=rf"scratch-1-s0: holds a trial of other {said} than .*; move it elsewhere"):
        run_study(config, data=data, starts=[], study=tmp_path / "study")
    assert at_once[0] == []


def test_a_trial_of_another_start_is_not_counted(config, data, start, at_once, tmp_path):
    half = start("half", 0.5, 0)
    folder = tmp_path / "study" / "trials" / "scratch-1-s0"
    finetune(replace(config, {"budget.fraction": 1.0}), data=data, start=half, run=folder)
    with pytest.raises(RunError, match=r"scratch-1-s0: holds a trial of other .*the start than this study's"):
        run_study(config, data=data, starts=[half], study=tmp_path / "study")


def test_called_again_a_study_runs_only_what_is_missing(config, data, at_once, tmp_path):
    ran, broken = at_once
    broken.add("scratch-1-s0")
    content = run_study(config, data=data, starts=[], study=tmp_path / "study")
    rows = {row.id: row for row in content.trials}
    assert rows["scratch-0.5-s0"].status == "done"
    assert rows["scratch-1-s0"].status == "failed" and rows["scratch-1-s0"].error == "OSError: disk full"
    broken.clear()
    ran.clear()
    content = run_study(config, data=data, starts=[], study=tmp_path / "study")
    assert ran == ["scratch-1-s0"]
    assert [row.status for row in content.trials] == ["done", "done"]


def test_what_was_running_when_the_process_was_killed_goes_on_and_what_had_ended_is_not_repeated(
    config, data, monkeypatch, tmp_path
):
    training = [case.name for case in open_source(data).cases if case.split == "training"]
    settings = {"budget.development": training[:1], "study.fractions": [1.0], "study.seeds": [0, 1]}
    settings |= {"finetune.steps": 4, "finetune.curve_every": 1}
    config = replace(config, settings)

    class Killed(BaseException):
        pass

    def until(trial_id, step):
        """Trials in this process, of which one is killed right after it has told of a step."""
        told = []

        def run_trials(function, trials, *, ended, reported, **options):
            for trial in trials:

                def report(figures, trial=trial):
                    if figures["step"] > len(trial["reported"]):  # as cluster.trials does
                        reported(trial, figures)
                    told.append((trial["id"], figures["step"], len(trial["reported"])))
                    if (trial["id"], figures["step"]) == (trial_id, step):
                        raise Killed

                ended(Outcome(trial, function(trial, report)))

        monkeypatch.setattr(study_module, "run_trials", run_trials)
        return told

    until(None, 0)
    whole = run_study(config, data=data, starts=[], study=tmp_path / "whole")
    until("scratch-1-s1", 2)
    monkeypatch.setattr(study_module.StudyTable, "save", lambda table: None)  # as after SIGKILL
    with pytest.raises(Killed):
        run_study(config, data=data, starts=[], study=tmp_path / "study")
    (tmp_path / "study" / "trials" / "scratch-1-s1" / ".lock").unlink(missing_ok=True)
    monkeypatch.undo()
    told = until("", 0)
    again = run_study(config, data=data, starts=[], study=tmp_path / "study")
    assert [(name, reported) for name, _, reported in told] == [("scratch-1-s1", 2)] * 4
    kept = [[getattr(row, key) for key in ("id", "status", "mean", "class_mean", "reports")] for row in again.trials]
    assert kept == [
        [getattr(row, key) for key in ("id", "status", "mean", "class_mean", "reports")] for row in whole.trials
    ]
    assert again.finished and len(again.trials[1].reports) == 4


def test_seeds_are_left_out_once_the_comparison_is_decided(config, data, start, monkeypatch, tmp_path, capsys):
    asked = []

    def run_trials(function, trials, *, ended, **options):
        for trial in trials:
            asked.append(trial["id"])
            gain = 0.2 * bool(trial["start"]) + 0.01 * (trial["seed"] % 3)
            ended(Outcome(trial, {"mean": 0.5 + gain, "class_mean": {}, "seconds": 1.0}))

    monkeypatch.setattr(study_module, "run_trials", run_trials)
    many = {"study.seeds": list(range(12)), "study.fractions": [1.0], "study.smallest_difference": 0.01}
    content = run_study(replace(config, many), data=data, starts=[start("none", 0, 0)], study=tmp_path / "study")
    assert len(asked) == 8, "four seeds tell"
    assert [row.status for row in content.trials] == ["done"] * 8 + ["barred"] * 16 and content.finished
    assert "4 seeds tell: +0.200" in content.trials[-1].error and "left out" in capsys.readouterr().err


def test_trials_share_a_gpu_as_the_probe_of_one_has_measured(config, data, at_once, monkeypatch, tmp_path, capsys):
    probed, shares = [], []
    run_trials = study_module.run_trials

    def measure(function, probes, **options):
        for probe in probes:
            function(probe, lambda figures: None)
            probed.append((probe["id"], FinetuneRecord.load(study / "trials" / probe["id"]).finished is not None))
        return GpuMemory(peak=7 * 10**9, beside=5 * 10**8, total=80 * 10**9)

    def trials_of_a_share(function, trials, *, config, **options):
        shares.append(config.gpus)
        run_trials(function, trials, **options)

    monkeypatch.setattr(study_module.packing, "measure", measure)
    monkeypatch.setattr(study_module, "run_trials", trials_of_a_share)
    study = tmp_path / "study"
    measured = replace(config, {"trials.gpus": "measured", "study.fractions": [1.0]})
    content = run_study(measured, data=data, starts=[], study=study)
    assert probed == [("probe-0", True)] and shares == [0.1111]
    assert "a trial takes 7.5 GB of a GPU's 80.0 GB: 9 share one" in capsys.readouterr().err
    assert [row.id for row in content.trials] == ["scratch-1-s0"] == [p.name for p in study.glob("trials/*-*")]
    begun = dataclasses.replace(content.trials[0], status="running")
    Ledger(study / "ledger.jsonl").add(begun.id, "x", "begun", trial=begun)
    assert standing(study).gpus == 0.1111
    run_study(measured, data=data, starts=[], study=study)
    assert len(shares) == 1, "there is nothing left to be packed"


PRETRAINED = {
    "views.size": [16, 16, 16],
    "pretrain.batch_size": 2,
    "budget.development": ["abdomen_000"],
    "study.fractions": [0.5],
    "study.search": {"optimizer.learning_rate": {"grid": [1e-3, 1e-2]}, "finetune.batch_size": {"grid": [1, 2]}},
}


def test_trials_that_share_a_pre_training_share_its_run(small_config, cohort, shards, known, tmp_path):
    settings = PRETRAINED | {"study.seeds": [0, 1], "finetune.patch_size": [24, 24, 24]}
    config = replace(small_config, settings)
    runs = Pretrainings(config, shards, tmp_path, Manifest.load(shards))
    trials = plan(config, open_task(cohort[0], config), [], known, runs)
    by_arm = {arm: [trial for trial in trials if trial["id"].startswith(arm)] for arm in ("scratch", "pretrained")}
    assert len(by_arm["pretrained"]) == 8 and len(by_arm["scratch"]) == 4, (
        "from scratch, pre-training's rate is no draw"
    )
    assert all("optimizer.learning_rate" not in trial["params"] for trial in by_arm["scratch"])
    assert len({trial["start"] for trial in by_arm["pretrained"]}) == 4 == len(runs.unfinished())
    without_labels = replace(config, {"objective.voxel_label": 0.0})
    unlabelled = Pretrainings(without_labels, shards, tmp_path, Manifest.load(shards))
    plan(without_labels, open_task(cohort[0], config), [], known, unlabelled)
    assert len(unlabelled.runs) == 2, "without labels, one for both seeds"


@pytest.mark.slow
def test_a_study_pre_trains_once_and_goes_on_from_what_it_has(small_config, cohort, shards, monkeypatch, tmp_path):
    settings = PRETRAINED | {"study.seeds": [0], "finetune.patch_size": [24, 24, 24], "finetune.steps": 2}
    config = replace(small_config, settings | {"pretrain.steps": 2, "finetune.batch_size": 1})
    ran = []

    def run_trials(function, trials, *, ended, **options):
        for trial in trials:
            ran.append(trial["id"])
            ended(Outcome(trial, function(trial, lambda figures: None)))

    monkeypatch.setattr(study_module, "run_trials", run_trials)
    content = run_study(config, data=cohort[0], starts=[], study=tmp_path / "study", shards=shards)
    assert [row.status for row in content.trials] == ["done"] * 6 and len(ran) == 8
    starts = {json.loads((tmp_path / "study" / row.run / "run.json").read_text())["start"] for row in content.trials}
    assert len(starts) == 3 and None in starts
    shutil.rmtree(tmp_path / "study" / "trials" / "pretrained-0.5-s0-p3")
    ran.clear()
    run_study(config, data=cohort[0], starts=[], study=tmp_path / "study", shards=shards)
    assert ran == ["pretrained-0.5-s0-p3"]


def test_one_arm_is_not_compared(config, data, tmp_path):
    with pytest.raises(ConfigError, match="there is one arm, so nothing to compare"):
        run_study(replace(config, {"study.smallest_difference": 0.01}), data=data, starts=[], study=tmp_path / "study")


def test_a_study_is_not_mixed_with_another(config, data, at_once, tmp_path):
    run_study(config, data=data, starts=[], study=tmp_path / "study")
    other = replace(config, {"finetune.steps": 3})
    with pytest.raises(RunError, match=r"other config \(finetune.steps\); give another --study"):
        run_study(other, data=data, starts=[], study=tmp_path / "study")
    run_study(replace(config, {"trials.concurrent": 1}), data=data, starts=[], study=tmp_path / "study")


def test_each_trial_takes_the_start_that_knows_most_and_nothing_withheld(config, data, start, known):
    none, half, all_labels = (start(f"labels-{f}", f, 0) for f in (0, 0.5, 1.0))
    trials = plan(config, open_task(data), [none, half, all_labels], known)
    chosen = {trial["id"]: trial["start"] for trial in trials if trial["id"].startswith("pretrained")}
    assert chosen == {"pretrained-0.5-s0": str(half), "pretrained-1-s0": str(all_labels)}


def test_without_a_lawful_start_the_study_does_not_begin(config, data, start, at_once, tmp_path):
    with pytest.raises(RunError, match=r"greedy: was trained with the labels of case .*--budget.seed"):
        run_study(config, data=data, starts=[start("greedy", 1.0, 0)], study=tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_scratch_has_the_network_of_the_starts(config, data, start, at_once, tmp_path):
    other = replace(config, {"network.filters": [6, 8, 8], "study.fractions": [1.0]})
    run_study(other, data=data, starts=[start("small", 0, 0)], study=tmp_path / "study")
    network = json.loads((tmp_path / "study" / "trials" / "scratch-1-s0" / "network.json").read_text())
    assert network["filters"] == [4, 8, 8]


def test_starts_with_different_networks_are_refused(config, data, start, at_once, tmp_path):
    starts = [start("small", 0, 0), start("large", 0, 0, filters=(8, 8, 8))]
    with pytest.raises(RunError, match="large: another network"):
        run_study(config, data=data, starts=starts, study=tmp_path / "study")


def test_searched_values_are_the_same_in_both_arms(config, data, start, known):
    searched = replace(
        config, {"study.search": {"finetune.learning_rate": {"loguniform": [1e-4, 1e-2]}}, "study.samples": 2}
    )
    trials = plan(searched, open_task(data), [start("none", 0, 0)], known)
    assert len(trials) == 8
    by_id = {trial["id"]: trial["params"] for trial in trials}
    assert by_id["scratch-1-s0-p1"] == by_id["pretrained-1-s0-p1"] != by_id["scratch-1-s0-p0"]


def test_a_search_over_an_unknown_key_is_refused_before_any_trial(config, data, known):
    searched = replace(config, {"study.search": {"finetune.learning_speed": {"grid": [1.0]}}})
    with pytest.raises(ConfigError, match="learning_rate"):
        check_search(replace(searched, {"budget.development": ["a"]}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"finetune.patch_size": [22, 24, 24]}, r"finetune\.patch_size 22,24,24: every edge must be a multiple of 4"),
        ({"study.search": {"finetune.patch_size": {"choice": [[24, 24, 22]]}}}, r"finetune\.patch_size 24,24,22"),
        ({"study.search": {"pretrain.steps": {"grid": [1]}}}, "a trial does not read pretrain.steps"),
    ],
)
def test_what_a_trial_would_refuse_is_refused_before_the_study_is_begun(
    config, data, at_once, tmp_path, settings, said
):
    training = [case.name for case in open_source(data).cases if case.split == "training"]
    wrong = replace(config, settings | {"budget.development": training[:1]})
    with pytest.raises(ConfigError, match=said):
        run_study(wrong, data=data, starts=[], study=tmp_path / "study")
    assert at_once[0] == [] and not (tmp_path / "study").exists()


@pytest.mark.slow
def test_the_table_runs_under_ray(config, data, start, tmp_path):
    content = run_study(config, data=data, starts=[start("small", 0.5, 0)], study=tmp_path / "study")
    assert [row.status for row in content.trials] == ["done"] * 4
    assert all((tmp_path / "study" / row.run / "dice.json").exists() for row in content.trials)


FROM_SCRATCH = """
import sys
from mixcl_dist import cli
from mixcl_dist.studies import study
run_study = study.run_study
study.run_study = lambda config, starts, **places: run_study(config, starts=[], **places)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_study_that_is_terminated_says_so_in_one_line_and_another_start_meanwhile_is_refused(data, tmp_path):
    study = tmp_path / "study"
    settings = {"finetune.steps": 100_000, "finetune.patch_size": "24,24,24", "network.filters": "4,8,8"}
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-c", FROM_SCRATCH, "tune", "--data", data, "--from", "none", "--study", study, *options]
    command = [str(word) for word in command]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 240
        while not list(study.glob("trials/*/run.json")) and time.monotonic() < end:
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.2)
        again = subprocess.run(command, capture_output=True, text=True)
        assert again.returncode == 2 and f"process {running.pid} of machine" in again.stderr
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=300)
    finally:
        running.kill()
    assert running.returncode == 130, said
    assert said.strip().splitlines()[-1].startswith("mixcl: interrupted; run the same command again")
    assert "Traceback" not in said and "SIGTERM" not in said
