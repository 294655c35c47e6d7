"""A run's folder: plain files, published whole, continued after an interruption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixcl_dist.config import Config, load, to_yaml
from mixcl_dist.errors import RunError
from mixcl_dist.records import FinetuneRecord, PretrainRecord, RunRecord, read_metrics
from mixcl_dist.run import Run, held, read_config


def pretraining(**facts) -> PretrainRecord:
    return PretrainRecord(name="run", finished=None, label_cases=("a",), **facts)


def test_a_run_leaves_its_configuration_and_facts(tmp_path):
    run = Run.create(tmp_path / "run", Config(), pretraining(parameters=3))
    run.log(1, loss=2.5)
    run.finish()
    record = RunRecord.load(tmp_path / "run")
    assert record.kind == "pretrain" and record.label_cases == ("a",) and record.parameters == 3
    assert record.finished >= record.started
    assert record.machine.cores > 0 and "torch" in record.versions
    assert load(tmp_path / "run" / "config.yaml") == Config()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    Run.create(tmp_path / "run", Config(), FinetuneRecord(name="run", finished=None, label_cases=()))
    with pytest.raises(RunError, match="holds a finetune run"):
        Run.create(tmp_path / "run", Config(), pretraining())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(RunError, match="other files"):
        Run.create(tmp_path / "photos", Config(), pretraining())
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match=r"file/run: .*; give a folder that you may write"),
        held(tmp_path / "file/run", "--run"),
    ):
        pass


def test_a_bucket_is_no_folder_to_work_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = r"--study s3://bucket/studies/one: what goes on there needs locks and renames; give a folder"
    with pytest.raises(RunError, match=told), held(Path("s3://bucket/studies/one"), "--study"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_killed_before_its_first_record_begins_again(tmp_path):
    """What such a process leaves: its configuration, and perhaps a file that it had not published."""
    (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    (tmp_path / ".run.json.0123.tmp").write_text('{"ki')
    Run.create(tmp_path, Config(), pretraining())
    assert RunRecord.load(tmp_path).kind == "pretrain"
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "run.json"}


def test_a_configuration_that_somebody_wrote_is_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("# mine\npretrain: {steps: 3}\n")
    with pytest.raises(RunError, match="other files"):
        Run.create(tmp_path, Config(), pretraining())
    assert (tmp_path / "config.yaml").read_text().startswith("# mine")


def test_a_torn_last_line_is_left_out_and_later_steps_are_forgotten(tmp_path):
    run = Run.create(tmp_path / "run", Config(), pretraining())
    for step in range(1, 6):
        run.log(step, loss=1 / step)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    run.forget_metrics_after(3)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3]


def test_tensorboard_shows_no_step_that_a_resume_forgot(tmp_path):
    first = Run.create(tmp_path / "run", Config(), pretraining())
    for step in range(1, 9):
        first.log(step, loss=float(step))
    first.finish()
    resumed = Run.create(tmp_path / "run", Config(), pretraining())
    resumed.forget_metrics_after(3)
    for step in range(4, 6):
        resumed.log(step, loss=100.0 + step)
    resumed.finish()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 104.0), (5, 105.0)]
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_time_adds_up_over_interruptions(tmp_path):
    run = Run.create(tmp_path / "run", Config(), pretraining())
    dataclasses.replace(run.record, seconds=100.0).save(tmp_path / "run")
    again = Run.create(tmp_path / "run", Config(), pretraining())
    assert again.record.seconds >= 100.0
    assert again.record.started == run.record.started


def test_a_configuration_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("finetune: {sliding_overlap: \"$__import__('os').getcwd()\"}")
    with pytest.raises(RunError, match=r"config.yaml: finetune.sliding_overlap = .*; mend it, or move the folder away"):
        read_config(tmp_path)
