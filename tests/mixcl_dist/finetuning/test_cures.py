"""What a prediction, or a trial of its start, refuses can be mended as its message says: each cure is followed here."""

from __future__ import annotations

import re
import shutil

import pytest

from mixcl_dist.arguments import parse
from mixcl_dist.cli import _parser, main
from mixcl_dist.config import load
from mixcl_dist.data_shards.building.processes import in_this_process
from mixcl_dist.export import export
from mixcl_dist.finetuning import predict as module
from mixcl_dist.finetuning.model import open_model
from mixcl_dist.finetuning.predict import predict
from mixcl_dist.finetuning.start import initial_network, like
from mixcl_dist.finetuning.task import budgeted, open_task
from mixcl_dist.records import ANEW

from ..cures import interrupt, refused


@pytest.fixture
def scan(data, tmp_path):
    """A folder with one scan."""
    (tmp_path / "scan").mkdir()
    shutil.copy(data / "validation/images/validation_000.nii.gz", tmp_path / "scan")
    return tmp_path / "scan"


@pytest.mark.parametrize("to", ["monai", "hf", "bundle"])
def test_what_is_no_network_is_exchanged_for_a_run_or_an_export(runs, tmp_path, to):
    said = "give the --run of mixcl finetune, or the --out of mixcl export --to monai, hf or bundle"
    assert to in said
    refused(said, open_model, tmp_path)
    open_model(runs / "few")
    open_model(export(runs / "few", to, tmp_path / "out"))


def test_a_pretraining_is_fine_tuned_by_the_command_that_is_said(runs, data):
    command = refused("fine-tune it first: mixcl (finetune .*)$", open_model, runs / "pre")
    words = [{"SOURCE": str(data), "N": "1", "RUN": str(runs / "few")}.get(word, word) for word in command.split()]
    options = parse(_parser(), words)
    config = like(load(overrides=options.overrides), options.start)
    assert budgeted(open_task(options.data, config), config.budget)
    open_model(runs / "few")


def test_an_export_of_a_pretraining_is_exchanged_for_that_of_what_was_fine_tuned(runs, tmp_path):
    exported = export(runs / "pre", "monai", tmp_path / "pre")
    refused("fine-tune the run that it is of, and export that", open_model, exported)
    open_model(export(runs / "few", "monai", tmp_path / "few"))


def test_a_trial_that_was_interrupted_is_run_to_its_end(runs, again):
    (runs / "few" / "dice.json").unlink()
    refused("has not finished; give its mixcl finetune command again$", open_model, runs / "few")
    again("few")
    open_model(runs / "few")


def test_a_start_that_was_interrupted_is_run_to_its_end(runs, again):
    interrupt(runs / "pre")
    said = "has not finished; give its mixcl pretrain command again with (--resume latest)"
    again("pre", *refused(said, like, load(), runs / "pre").split())
    like(load(), runs / "pre")


def test_damaged_weights_of_a_start_are_made_again(runs):
    (runs / "pre" / "network.safetensors").write_bytes(b"damaged")
    refused(f"copy it again, or {ANEW}", initial_network, like(load(), runs / "pre"), runs / "pre", 1)


def test_missing_weights_are_made_again(runs, again):
    (runs / "few" / "model.safetensors").unlink()
    refused(f"no such file; {ANEW}", open_model, runs / "few")
    (runs / "few").rename(runs / "away")
    again("few")
    open_model(runs / "few")


def test_sided_classes_are_not_mirrored(runs, scan, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SIDES", frozenset({"liver"}))
    refused("--mirror: liver lies on one side, .*; leave it out", predict, runs / "few", scan, tmp_path, mirror=True)
    predict(runs / "few", scan, tmp_path / "out")


def test_another_prediction_is_put_elsewhere(runs, scan, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    refused("holds other files; give an empty or new --out", predict, runs / "few", scan, tmp_path / "used")
    predict(runs / "few", scan, tmp_path / "out")
    said = "holds a prediction with another mirror; give another --out"
    refused(said, predict, runs / "few", scan, tmp_path / "out", mirror=True)
    predict(runs / "few", scan, tmp_path / "mirrored", mirror=True)


def test_a_scan_that_takes_too_much_memory_is_taken_up_by_the_same_command_where_there_is_more(
    runs, scan, tmp_path, monkeypatch
):
    def too_much(*arguments, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(module, "segment", too_much)
        (refusal,) = predict(runs / "few", scan, tmp_path / "out").refused
    assert refusal.problem == "takes more memory than there is; take a machine with more memory"
    assert predict(runs / "few", scan, tmp_path / "out").refused == ()


def test_a_scan_for_which_there_is_no_memory_beside_others_is_segmented_by_fewer_workers(
    runs, scan, tmp_path, monkeypatch
):
    def crowded(work, case):
        if work.workers > 1:
            raise MemoryError
        segmented(work, case)

    segmented = module._predict_and_write
    monkeypatch.setattr(module, "_predict_and_write", crowded)
    monkeypatch.setattr(module, "in_processes", lambda workers: in_this_process)
    (refusal,) = predict(runs / "few", scan, tmp_path / "out", workers=2).refused
    (option,) = re.findall("; give fewer (--workers), or take a machine with more memory$", refusal.problem)
    words = ["predict", str(runs / "few"), "--data", str(scan), "--out", str(tmp_path / "out"), option, "1"]
    assert main(words) == 0


def test_a_scan_whose_process_died_alone_too_is_taken_up_by_the_same_command_where_there_is_more_memory(
    runs, scan, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(module, "in_processes", lambda workers: lambda work, cases: ((c, None, "killed") for c in cases))
        (refusal,) = predict(runs / "few", scan, tmp_path / "out", workers=2).refused
    assert refusal.problem == "the process that segmented it died (killed); take a machine with more memory"
    assert predict(runs / "few", scan, tmp_path / "out", workers=1).refused == ()
