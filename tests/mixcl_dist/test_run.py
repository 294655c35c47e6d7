"""A run's folder: plain files, published whole, continued after an interruption."""

import json

import pytest

from mixcl_dist.config import Config, load
from mixcl_dist.run import Run, RunError, held, read_json, read_metrics, write_atomic


def test_a_run_leaves_its_configuration_and_facts(tmp_path):
    run = Run.create(tmp_path / "run", "pretrain", Config(), label_cases=["a"])
    run.log(1, loss=2.5)
    run.finish(note="done")
    facts = read_json(tmp_path / "run" / "run.json")
    assert facts["kind"] == "pretrain" and facts["label_cases"] == ["a"] and facts["note"] == "done"
    assert facts["finished"] >= facts["started"]
    assert {"cpu", "cores", "gpu", "memory_gb"} == set(facts["machine"])
    assert "torch" in facts["versions"]
    assert load(tmp_path / "run" / "config.yaml") == Config()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    Run.create(tmp_path / "run", "finetune", Config())
    with pytest.raises(RunError, match="finetune"):
        Run.create(tmp_path / "run", "pretrain", Config())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(RunError, match="other files"):
        Run.create(tmp_path / "photos", "pretrain", Config())
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match=r"file/run: .*; give a folder that you may write"),
        held(tmp_path / "file/run", "--run"),
    ):
        pass


def test_a_run_that_was_killed_before_its_facts_were_written_begins_anew(tmp_path):
    Run.create(tmp_path / "run", "pretrain", Config())
    (tmp_path / "run" / "run.json").rename(tmp_path / "run" / ".run.json.12.tmp")
    Run.create(tmp_path / "run", "pretrain", Config())
    assert read_json(tmp_path / "run" / "run.json")["kind"] == "pretrain"


def test_a_torn_last_line_is_left_out_and_later_steps_are_forgotten(tmp_path):
    run = Run.create(tmp_path / "run", "pretrain", Config())
    for step in range(1, 6):
        run.log(step, loss=1 / step)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    run.forget_metrics_after(3)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3]


def test_time_adds_up_over_interruptions(tmp_path):
    run = Run.create(tmp_path / "run", "pretrain", Config())
    run.facts["seconds"] = 100.0
    write_atomic(tmp_path / "run" / "run.json", json.dumps(run.facts).encode())
    again = Run.create(tmp_path / "run", "pretrain", Config())
    assert again.facts["seconds"] >= 100.0
    assert again.facts["started"] == run.facts["started"]


def test_a_failed_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "facts.json"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "not bytes")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["facts.json"]


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    for name in ("run.json", "absent.json"):
        with pytest.raises(RunError, match=name):
            read_json(tmp_path / name)
