"""Progress tells count, rate and time left, in lines that a log file can hold."""

import re

from mixcl_dist import progress as module
from mixcl_dist.progress import ProgressReport, progress


def test_items_pass_through_unchanged(capsys):
    assert list(progress("abc", total=3, desc="letters", unit="letter")) == ["a", "b", "c"]
    assert "letters: 3/3 letter (100 %)" in capsys.readouterr().err


def test_lines_tell_rate_and_time_left(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    report = ProgressReport("train")
    report(40, 100, "step")
    clock[0] += 20
    report(50, 100, "step")
    assert "train: 50/100 step (50 %), 2.0 s/step, 01:40 left" in capsys.readouterr().err


def test_a_resumed_run_does_not_count_what_was_done_before(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    for _ in progress(range(900, 1000), total=1000, desc="train", unit="step", initial=900):
        clock[0] += 0.5
    rates = {float(rate) for rate in re.findall(r"([\d.]+) step/s", capsys.readouterr().err)}
    assert rates == {2.0}


def test_a_log_is_not_flooded(capsys):
    list(progress(range(10_000), total=10_000, desc="fast", unit="item"))
    assert len(capsys.readouterr().err.splitlines()) <= 2
