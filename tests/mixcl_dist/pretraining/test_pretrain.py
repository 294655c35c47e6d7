"""Pre-training on a phantom's shards: the label budget holds, and a killed run goes on as if never stopped."""

import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from mixcl_dist import cli
from mixcl_dist.cluster.checkpoint import CheckpointError
from mixcl_dist.config import ConfigError, replace
from mixcl_dist.config import load as load_config
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.errors import RunError
from mixcl_dist.networks.dynunet import Backbone
from mixcl_dist.pretraining import pretrain as loop
from mixcl_dist.pretraining.objective import mixcl_loss
from mixcl_dist.pretraining.pretrain import budgeted_labels, pretrain
from mixcl_dist.records import PretrainRecord, read_metrics
from mixcl_dist.run import held
from mixcl_dist.seen import Seen
from mixcl_dist.settings import BudgetConfig

from ..conftest import SMALL


def command(shards, run, steps):
    settings = SMALL | {"pretrain.steps": steps, "pretrain.sample_every": 100, "checkpoint.every": 2}
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "mixcl_dist", "pretrain", "--data", shards, "--run", run, *options]


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, "the run ended before its first checkpoint"
        time.sleep(0.01)


def test_a_run_leaves_what_report_and_finetune_read(shards, small_config, tmp_path, capsys):
    config = replace(small_config, {"pretrain.steps": 3, "budget.fraction": 0.5})
    pretrain(config, shards=shards, run=tmp_path / "run")
    facts = PretrainRecord.load(tmp_path / "run")
    manifest = Manifest.load(shards)
    assert facts.kind == "pretrain" and facts.finished
    assert sorted(facts.label_cases) == sorted(budgeted_labels(manifest, config.budget)) != []
    assert set(facts.training_cases) == {case.name for case in manifest.cases}
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [entry["step"] for entry in metrics] == [1, 2, 3]
    assert {"loss", "voxel_identity", "crop_identity", "reconstruction", "learning_rate", "samples_per_s",
            "data_wait_share"} <= set(metrics[-1])  # fmt: skip
    assert all(entry["gradient_norm"] > 0 and 0 <= entry["clipped_share"] <= 1 for entry in metrics)
    measured = {"gradient_norm_voxel_identity", "gradient_norm_voxel_label", "gradient_norm_crop_identity",
                "gradient_norm_reconstruction", "alignment", "uniformity", "effective_rank"}  # fmt: skip
    assert measured <= set(metrics[-1]) and not measured & set(metrics[0])
    assert all(metrics[-1][f"gradient_norm_{term}"] > 0 for term in ("voxel_identity", "crop_identity"))
    Backbone(config.network).load_state_dict(load_file(tmp_path / "run" / "network.safetensors"))
    assert (tmp_path / "run" / "samples.npz").exists()
    assert facts.arithmetic in ("float32", "bfloat16 autocast, float32 master weights")
    assert f"; {facts.arithmetic} on cpu" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_zero_stage_takes_the_same_steps(shards, small_config, tmp_path, stage):
    runs = {}
    for number in (1, stage):
        config = replace(small_config, {"pretrain.steps": 2, "engine.zero_stage": number})
        pretrain(config, shards=shards, run=tmp_path / str(number))
        runs[number] = load_file(tmp_path / str(number) / "network.safetensors")
    for name, expected in runs[1].items():
        torch.testing.assert_close(runs[stage][name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_measuring_gradients_changes_no_bit_of_the_weights(shards, small_config, tmp_path, stage):
    runs = []
    for every in (0, 1):
        settings = {"pretrain.steps": 3, "engine.zero_stage": stage, "pretrain.gradient_norms_every": every}
        run = tmp_path / str(every)
        pretrain(replace(small_config, settings), shards=shards, run=run)
        runs.append(load_file(run / "network.safetensors"))
        logged = [any(name.startswith("gradient_norm_") for name in row) for row in read_metrics(run / "metrics.jsonl")]
        assert logged == [bool(every)] * 3
    for name, weights in runs[0].items():
        torch.testing.assert_close(runs[1][name], weights, rtol=0, atol=0)


@pytest.mark.parametrize("stage", [0, 3])
def test_activations_that_are_computed_again_change_no_bit_of_the_weights(shards, small_config, tmp_path, stage):
    runs = []
    for again in (False, True):
        settings = {"pretrain.steps": 3, "engine.zero_stage": stage, "engine.activation_checkpointing": again}
        pretrain(replace(small_config, settings), shards=shards, run=tmp_path / str(again))
        runs.append(load_file(tmp_path / str(again) / "network.safetensors"))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=0)


def test_pictures_have_nothing_compiled_anew(shards, small_config, tmp_path, monkeypatch):
    """They are of one view of each patch, where a step has two, and a graph of another size takes minutes."""
    sizes, view, compile_module = [], small_config.views.size, torch.nn.Module.compile

    def compiler(graph, inputs):
        sizes.extend(len(tensor) for tensor in inputs if tensor.dim() == 5 and tensor.shape[2:] == view)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compile_module(module, backend=compiler))
    settings = {"pretrain.steps": 1, "engine.compile": True, "pretrain.gradient_norms_every": 0}
    pretrain(replace(small_config, settings), shards=shards, run=tmp_path / "run")
    assert (tmp_path / "run" / "samples.npz").exists()
    assert set(sizes) == {2 * small_config.pretrain.batch_size}


def test_scattered_parameters_have_no_gradient_of_single_terms_which_is_said_once(
    shards, small_config, tmp_path, capsys
):
    settings = {"pretrain.steps": 2, "engine.zero_stage": 3, "pretrain.gradient_norms_every": 1}
    pretrain(replace(small_config, settings), shards=shards, run=tmp_path / "run")
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert "effective_rank" in last and not any(name.startswith("gradient_norm_") for name in last)
    assert capsys.readouterr().err.count("at ZeRO stage 3") == 1
    assert "at ZeRO stage 3" in PretrainRecord.load(tmp_path / "run").warnings["gradient_norms"]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(shards, tmp_path):
    """SIGKILL after a checkpoint; samples, views and optimizer go on exactly, so the weights are equal to the bit."""
    subprocess.run(command(shards, tmp_path / "whole", 7), check=True, capture_output=True)

    killed = subprocess.Popen(
        command(shards, tmp_path / "killed", 7), stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(tmp_path / "killed" / "checkpoints" / "step_00000002", killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "network.safetensors").exists()
    resume = [sys.executable, "-m", "mixcl_dist", "pretrain", "--data", shards, "--run", tmp_path / "killed"]
    resume += ["--data.workers", "2"]  # they do not change what is learnt
    subprocess.run([*resume, "--resume", "latest"], check=True, capture_output=True)

    whole, resumed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert [entry["loss"] for entry in resumed] == [entry["loss"] for entry in whole]
    expected = load_file(tmp_path / "whole" / "network.safetensors")
    for name, weights in load_file(tmp_path / "killed" / "network.safetensors").items():
        torch.testing.assert_close(weights, expected[name], rtol=0, atol=0)


def test_the_budget_is_counted_within_each_dataset(shards):
    manifest = Manifest.load(shards)
    assert budgeted_labels(manifest, BudgetConfig(fraction=0.0)) == []
    one = budgeted_labels(manifest, BudgetConfig(fraction=0.01))
    assert len(one) == len({case.dataset for case in manifest.cases if case.labelled})
    dataset = next(case.dataset for case in manifest.cases if case.labelled)
    full = budgeted_labels(manifest, BudgetConfig(fraction=0.0, full_datasets=(dataset,)))
    assert set(full) == {case.name for case in manifest.cases if case.dataset == dataset and case.reliable}
    with pytest.raises(ConfigError, match="elsewhere is not in the shards"):
        budgeted_labels(manifest, BudgetConfig(full_datasets=("elsewhere",)))


def test_development_cases_are_neither_seen_nor_budgeted(shards, small_config, tmp_path):
    manifest = Manifest.load(shards)
    kept_back = next(case.name for case in manifest.cases if case.reliable and case.split == "training")
    settings = {"pretrain.steps": 1, "budget.fraction": 1.0, "budget.development": [kept_back]}
    pretrain(replace(small_config, settings), shards=shards, run=tmp_path / "run")
    facts = PretrainRecord.load(tmp_path / "run")
    others = {case.name for case in manifest.cases} - {kept_back}
    assert set(facts.training_cases) == others and kept_back in facts.withheld_cases
    assert set(facts.label_cases) == {case.name for case in manifest.cases if case.reliable} - {kept_back}
    with pytest.raises(ConfigError, match=r"budget.development: there is no case nobody"):
        pretrain(replace(small_config, {"budget.development": ["nobody"]}), shards=shards, run=tmp_path / "other")


def test_only_labels_of_the_budget_s_classes_are_read_and_noted(shards, small_config, tmp_path):
    settings = {"pretrain.steps": 1, "budget.fraction": 1.0, "budget.classes": ["liver", "aorta"]}
    pretrain(replace(small_config, settings), shards=shards, run=tmp_path / "run")
    seen = Seen.load(tmp_path / "run")
    reliable = {case.name: set(case.reliable) for case in Manifest.load(shards).cases}
    for scan, labels in zip(seen.scans, seen.labels, strict=True):
        assert labels == reliable[scan.name] & {"liver", "aorta"}
    assert any(seen.labels)
    with pytest.raises(ConfigError, match=r"budget.classes: heart is none of the shards' classes; choose among liver"):
        pretrain(replace(small_config, {"budget.classes": ["heart"]}), shards=shards, run=tmp_path / "other")


@pytest.fixture(scope="module")
def first_stage(shards, small_config, tmp_path_factory):
    """A run with labels, and another that began from its network and reads none."""
    runs = tmp_path_factory.mktemp("stages")
    labelled = replace(small_config, {"pretrain.steps": 1, "budget.fraction": 1.0})
    pretrain(labelled, shards=shards, run=runs / "first")
    still = {"pretrain.steps": 1, "optimizer.learning_rate": 1e-12, "budget.fraction": 0.0}
    pretrain(replace(small_config, still), shards=shards, run=runs / "second", start=runs / "first")
    return runs / "first", runs / "second"


def test_a_start_gives_all_its_weights(first_stage):
    first, second = (load_file(run / "pretrain.safetensors") for run in first_stage)
    assert any(name.startswith("voxel_head") for name in first)
    for name, weights in first.items():
        torch.testing.assert_close(second[name], weights, rtol=1e-5, atol=1e-6)


def test_what_a_start_has_seen_the_next_run_has_seen(first_stage, shards):
    first, second = (PretrainRecord.load(run) for run in first_stage)
    assert set(second.label_cases) == set(first.label_cases) != set()
    assert first.start is None and second.start == str(first_stage[0].resolve())
    seen = Seen.load(first_stage[1])
    records = {case.name: case for case in Manifest.load(shards).cases}
    assert {scan.name: scan.digest for scan in seen.scans} == {name: records[name].source_digest for name in records}
    assert {scan.name for scan, labels in zip(seen.scans, seen.labels, strict=True) if labels} == set(first.label_cases)


def test_a_resumed_run_keeps_to_the_start_it_began_from(first_stage, shards, small_config, tmp_path):
    first, second = first_stage
    still = load_config(second / "config.yaml")
    shutil.copytree(second, tmp_path / "run")
    pretrain(still, shards=shards, run=tmp_path / "run", start=first, resume=True)
    assert PretrainRecord.load(tmp_path / "run").start == str(first.resolve())
    assert Seen.load(tmp_path / "run").labels == Seen.load(second).labels
    with pytest.raises(RunError, match="goes on with that; leave out --start"):
        pretrain(still, shards=shards, run=tmp_path / "run", start=second, resume=True)


def test_a_start_of_another_architecture_is_refused(first_stage, shards, small_config, tmp_path):
    wider = replace(small_config, {"network.voxel_dim": 16, "network.filters": [4, 6, 12]})
    with pytest.raises(RunError, match=r"first: differs in network.filters, network.voxel_dim; give"):
        pretrain(wider, shards=shards, run=tmp_path / "run", start=first_stage[0])
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_never_overwritten(shards, small_config, tmp_path):
    config = replace(small_config, {"pretrain.steps": 1})
    pretrain(config, shards=shards, run=tmp_path / "run")
    with pytest.raises(RunError, match="--resume latest, or give another --run"):
        pretrain(config, shards=shards, run=tmp_path / "run")
    with pytest.raises(RunError, match="no run to resume"):
        pretrain(config, shards=shards, run=tmp_path / "other", resume=True)


def test_a_run_goes_on_with_its_own_settings(shards, small_config, tmp_path):
    pretrain(replace(small_config, {"pretrain.steps": 2}), shards=shards, run=tmp_path / "run")
    for key, value in (("pretrain.steps", 4), ("optimizer.weight_decay", 0.5)):
        config = replace(small_config, {"pretrain.steps": 2, key: value})
        with pytest.raises(RunError, match=f"{key} differs from the run's config.yaml"):
            pretrain(config, shards=shards, run=tmp_path / "run", resume=True)
    again = replace(small_config, {"pretrain.steps": 2, "pretrain.log_every": 2, "checkpoint.keep": 1})
    pretrain(again, shards=shards, run=tmp_path / "run", resume=True)


def test_a_refused_resume_changes_nothing_that_is_known_of_the_run(shards, cohort, small_config, tmp_path):
    config = replace(small_config, {"pretrain.steps": 2, "budget.fraction": 0.5})
    pretrain(config, shards=shards, run=tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    build(cohort[1:], tmp_path / "other", small_config.build)
    with pytest.raises(RunError, match="begun on other shards"):
        pretrain(config, shards=tmp_path / "other", run=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("views.size", (32, 32, 32), "larger than the shards' patches"),
        ("views.size", (18, 16, 16), r"views\.size 18,16,16: every edge must be a multiple of 4, .*try 16,16,16"),
        ("views.size", (4, 4, 4), r"not all 4 x 4 x 4; try 4,4,8"),
        ("objective", {"voxel_identity": 0, "crop_identity": 0, "reconstruction": 0}, "no labels may be read"),
        ("engine.accumulation_steps", 3, "not a multiple of 1 ranks × 3 accumulation steps"),
    ],
)
def test_settings_that_do_not_fit_the_shards_are_refused(shards, small_config, tmp_path, key, value, said):
    with pytest.raises(ConfigError, match=said):
        pretrain(replace(small_config, {key: value}), shards=shards, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def diverging(monkeypatch, largest_rate, from_call):
    """Let the loss be NaN at a learning rate above `largest_rate`, from a number of calls on."""
    calls = itertools.count(1)

    def loss(*arguments):
        value, terms = mixcl_loss(*arguments)
        bad = next(calls) >= from_call and rate[0] > largest_rate
        return value * (math.nan if bad else 1.0), terms

    rate = [1.0]
    monkeypatch.setattr(loop, "mixcl_loss", loss)
    return rate


@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_that_diverges_stops_before_its_checkpoints_are_spoilt_and_goes_on_as_it_advises(
    shards, small_config, tmp_path, monkeypatch, stage
):
    run = tmp_path / "run"
    settings = {
        "pretrain.steps": 9, "pretrain.log_every": 8, "checkpoint.every": 1, "pretrain.max_skipped": 3,
        "pretrain.sample_every": 1, "engine.zero_stage": stage,
    }  # fmt: skip
    config = replace(small_config, settings)
    rate = diverging(monkeypatch, 1e-4, from_call=4)
    with pytest.raises(RunError, match=r"from step 4 to 6; lower .*--resume latest, .* from step_00000002"):
        pretrain(config, shards=shards, run=run)
    saved = run / "checkpoints"
    assert sorted(path.name for path in saved.glob("step_*")) == ["step_00000002"]
    assert (saved / "diverged_step_00000003").exists()
    assert all(weights.isfinite().all() for weights in load_file(saved / "step_00000002/engine.safetensors").values())

    rate[0] = 1e-5
    pretrain(replace(config, {"optimizer.learning_rate": 1e-5}), shards=shards, run=run, resume=True)
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["step"] == 9 and last["learning_rate"] <= 1e-5 and "skipped_steps" not in last


@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_that_diverges_goes_back_with_a_lower_rate_where_it_may(
    shards, small_config, tmp_path, monkeypatch, capsys, stage
):
    """Steps 4 to 6 at first, then steps 5 to 7 have no finite gradient."""
    settings = {
        "pretrain.steps": 9, "checkpoint.every": 1, "pretrain.max_skipped": 3, "pretrain.rewind_factor": 0.1,
        "engine.zero_stage": stage,
    }  # fmt: skip
    calls = itertools.count(1)

    def loss(*arguments):
        value, terms = mixcl_loss(*arguments)
        return value * (math.nan if next(calls) in (4, 5, 6, 9, 10, 11) else 1.0), terms

    monkeypatch.setattr(loop, "mixcl_loss", loss)
    run = tmp_path / "run"
    pretrain(replace(small_config, settings), shards=shards, run=run)
    metrics = read_metrics(run / "metrics.jsonl")
    assert [entry["step"] for entry in metrics] == list(range(1, 10))
    rates = [entry["learning_rate"] for entry in metrics]
    assert rates[1] > 1e-4 >= rates[2] > 1e-5 >= rates[3] and "skipped_steps" not in metrics[-1]
    assert load_config(run / "config.yaml").optimizer.learning_rate == pytest.approx(1e-5)
    said = capsys.readouterr().err
    assert said.count("no gradient was finite; goes on from step ") == 2
    assert "goes on from step 3 with optimizer.learning_rate 1e-05" in said


def test_a_run_that_diverges_from_the_first_step_says_to_start_anew(shards, small_config, tmp_path, monkeypatch):
    hopeless = {"pretrain.max_skipped": 2, "checkpoint.every": 1}
    diverging(monkeypatch, 0.0, from_call=1)
    with pytest.raises(RunError, match=r"no gradient has been finite .*; start anew with a lower --optimizer"):
        pretrain(replace(small_config, hopeless), shards=shards, run=tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, None])
def test_a_run_that_is_asked_to_stop_saves_its_step_and_says_how_to_go_on(
    shards, tmp_path, monkeypatch, capsys, number
):
    def interrupted(*arguments):
        if interrupted.armed and number:
            os.kill(os.getpid(), number)
        return mixcl_loss(*arguments)

    interrupted.armed = True
    monkeypatch.setattr(loop, "mixcl_loss", interrupted)
    arguments = [str(word) for word in command(shards, tmp_path / "run", 3)[3:]]
    most = [] if number else ["--pretrain.max_hours", "1e-9"]
    assert cli.main([*arguments, "--checkpoint.every", "100", *most]) == 75
    assert capsys.readouterr().err.splitlines()[-1].endswith("saved at step 1; go on with --resume latest")
    interrupted.armed = False
    again = ["pretrain", "--data", str(shards), "--run", str(tmp_path / "run"), "--resume", "latest"]
    assert cli.main([*again, "--pretrain.max_hours", "null"]) == 0
    assert [entry["step"] for entry in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_two_starts_at_once_never_share_a_run(shards, small_config, tmp_path):
    run = tmp_path / "run"
    with held(run, "--run"), pytest.raises(RunError, match=rf"process {os.getpid()} of machine .* give another --run"):
        pretrain(small_config, shards=shards, run=run)
    assert not run.exists()


def test_after_a_refusal_the_right_command_runs_in_the_same_folder(shards, small_config, tmp_path):
    for size in ((18, 16, 16), (16, 16, 16)):
        config = replace(small_config, {"views.size": size, "pretrain.steps": 1})
        with nullcontext() if size == (16, 16, 16) else pytest.raises(ConfigError):
            pretrain(config, shards=shards, run=tmp_path / "run")
    pretrain(replace(config, {"checkpoint.keep": 1}), shards=shards, run=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("budget", "terms", "said"),
    [
        (
            {},
            ["voxel_identity", "crop_identity", "reconstruction"],
            "no labels, as the budget is empty (see --budget.scans",
        ),
        (
            {"budget.scans": 1},
            ["voxel_identity", "voxel_label", "crop_identity", "reconstruction"],
            "labels of 1 case;",
        ),
    ],
)
def test_a_run_says_what_it_learns_from(shards, small_config, tmp_path, capsys, budget, terms, said):
    pretrain(replace(small_config, {"pretrain.steps": 1} | budget), shards=shards, run=tmp_path / "run")
    first = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("pretrain:"))
    assert first.startswith(f"pretrain: learns from {', '.join(terms)}; {said}")
    assert list(PretrainRecord.load(tmp_path / "run").terms) == terms


def test_a_run_without_a_whole_checkpoint_begins_anew_only_by_the_advice(shards, small_config, tmp_path, capsys):
    run = tmp_path / "run"
    config = replace(small_config, {"pretrain.steps": 2, "checkpoint.every": 1})
    pretrain(config, shards=shards, run=run)
    saved = run / "checkpoints"
    (saved / "step_00000002" / "network.safetensors").write_bytes(b"")
    capsys.readouterr()
    pretrain(config, shards=shards, run=run, resume=True)
    assert capsys.readouterr().err.count("step_00000002 is passed over") == 1
    for checkpoint in saved.iterdir():
        (checkpoint / "network.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="move this folder away"):
        pretrain(config, shards=shards, run=run, resume=True)
    saved.rename(run / "away")
    pretrain(config, shards=shards, run=run, resume=True)
    assert "begins at step 0" in capsys.readouterr().err
    assert [entry["step"] for entry in read_metrics(run / "metrics.jsonl")] == [1, 2]
