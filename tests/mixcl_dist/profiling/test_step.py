"""A step is split into parts that add up, beside floors, and told in a result that can be compared."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest

from mixcl_dist import cli
from mixcl_dist.config import replace
from mixcl_dist.profiling import step
from mixcl_dist.profiling.result import Result

SMALL = shlex.split(
    "--network.filters 4,6,8 --views.size 16,16,16 --rows.per_view_pair 32 --pretrain.batch_size 4 --data.workers 0"
)


@pytest.fixture
def clock(monkeypatch):
    """A clock of parts, and a function that lets ms go by."""
    now = [0.0]
    monkeypatch.setattr(step, "timer", lambda: now[0] / 1e3)

    def wait(ms):
        now[0] += ms

    return step._Clock(lambda: None), wait


def test_a_part_counts_without_those_inside_it_and_all_add_up(clock):
    clock, wait = clock
    for ms in (1, 2):
        with clock.part("step"):
            wait(ms)
            for _ in range(2):
                with clock.part("forward"):
                    wait(10)
            with clock.part("backward"):
                wait(5)
                with clock.part("loss"):
                    wait(100)
    first, second = clock.steps
    assert first == pytest.approx({"step": 126, "forward": 20, "backward": 5, "loss": 100, "the rest": 1})
    assert second == pytest.approx(first | {"step": 127, "the rest": 2})


def test_what_is_done_now_and_then_is_done_in_the_last_step_alone(small_config):
    often = {"checkpoint.every": 2, "pretrain.sample_every": 3, "pretrain.gradient_norms_every": 4}
    timed = step._to_be_timed(replace(small_config, often), 20)
    last = timed.pretrain.steps
    assert last == step.WARM + 20 + 1
    assert (timed.checkpoint.every, timed.pretrain.sample_every, timed.pretrain.gradient_norms_every) == (last,) * 3
    never = replace(small_config, {"pretrain.gradient_norms_every": 0})
    assert step._to_be_timed(never, 20).pretrain.gradient_norms_every == 0


def profile(**parts):
    rest = {"once": {}, "floors": {}, "flop_ms": 1.0, "parameters": 1, "checkpoint_bytes": 1, "peak_bytes": None}
    whole = [sum(parts.values())] * 3
    times = {"step": whole} | {name: [ms] * 3 for name, ms in parts.items()}
    return step.Profile(parts=times, twin=[50.0] * 3, decode=[1.0], **rest)


def test_what_is_lost_most_is_told_with_the_setting_that_changes_it(small_config):
    assert "lost in wait: 60.0 of 100.0 ms" in profile(wait=60, forward=40).said(small_config)
    assert "data.workers changes it" in profile(wait=60, forward=40).said(small_config)
    assert "the loader costs 50%" in profile(wait=60, forward=40).said(small_config)


def test_a_part_at_its_floor_is_not_lost(small_config):
    at_floor = profile(forward=90, rows=10)
    at_floor.floors.update(forward=89.0)
    assert "lost in rows" in at_floor.said(small_config)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--out", "nowhere/now.json", "its folder does not exist"),
        ("--trace", "nowhere/trace.json", "its folder does not exist"),
        ("--against", "nowhere.json", "no such file"),
        ("--seconds", "-3", "no number of seconds"),
        ("--smallest", "2", "no share"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(option, value, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(["benchmark", "--data", "absent", option, value])
    except SystemExit as ending:
        code = ending.code
    assert code == 2 and said in capsys.readouterr().err


def test_one_of_several_processes_measures_nothing(monkeypatch, small_config):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="by itself"):
        step.benchmark(small_config, "absent", seconds=0)


@pytest.mark.slow
def test_a_users_shards_are_measured_traced_and_compared(shards, tmp_path, capsys):
    out, trace = tmp_path / "now.json", tmp_path / "trace.json"
    words = ["benchmark", "--data", str(shards), "--seconds", "0", *SMALL]
    assert cli.main([*words, "--out", str(out), "--trace", str(trace)]) == 0
    read = Result.read(out)
    wholes = np.array(read.figures["step"].samples)
    parts = {"wait", "views", "rows", "forward", "loss", "backward", "optimizer", "the rest"}
    summed = np.sum([read.figures[name].samples for name in parts], axis=0)
    np.testing.assert_allclose(summed, wholes, rtol=1e-6)
    for name in ("forward, floor", "inspection", "pictures", "checkpoint"):
        assert len(read.figures[name].samples) == 1
    np.testing.assert_allclose(read.figures["patches"].samples, 4000 / wholes)
    assert out.with_suffix(".html").exists() and "Most is lost in" in capsys.readouterr().out
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"mixcl/views", "mixcl/backward"} <= names

    fast = read.content()
    for figure in fast["figures"].values():
        figure["samples"] = [sample / 1e3 if figure["better"] == "less" else sample for sample in figure["samples"]]
    (tmp_path / "before.json").write_text(json.dumps(fast))
    assert cli.main([*words, "--against", str(tmp_path / "before.json")]) == 1
    assert "worse: none" not in capsys.readouterr().out
