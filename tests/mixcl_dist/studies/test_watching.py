"""A study that runs is shown as its folder has it at that moment, in the terminal and on its page."""

from __future__ import annotations

import dataclasses
import random

import pytest

from mixcl_dist.cli import main
from mixcl_dist.config import Config, replace, to_dict
from mixcl_dist.records import StudyRecord, TrialRecord
from mixcl_dist.report import write_report
from mixcl_dist.report.folders import open_study
from mixcl_dist.report.searched import Judged, search_results, share_of
from mixcl_dist.studies.ledger import Ledger
from mixcl_dist.studies.watching import standing, text

SEARCH = {"finetune.learning_rate": {"loguniform": [1e-4, 1e-1]}, "finetune.batch_size": {"choice": [1, 2]}}


@pytest.fixture
def study(tmp_path):
    """Ten trials of 20: four done, four stopped after 250 of 1,000 steps, one failed, one running."""
    settings = {"study.search": SEARCH, "study.samples": 20, "study.method": "tpe", "study.stopping": "asha"}
    config = to_dict(replace(Config(), settings | {"finetune.steps": 1000, "trials.gpus": 0.5}))
    record = StudyRecord(
        name="search", started="2026-01-01T00:00:00+00:00", config=config, starts=("scratch",), trials=()
    )
    record.save(tmp_path)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number in range(10):
        params = {"finetune.learning_rate": 10 ** (-4 + number / 4), "finetune.batch_size": 1 + number % 2}
        row = TrialRecord(
            id=f"p{number}", start="scratch", fraction=1.0, seed=0, params=params, run=f"trials/p{number}"
        )
        ledger.add(row.id, "x", "begun", trial=dataclasses.replace(row, status="running"))
        ledger.add(row.id, "x", "partial", step=250, mean=0.1 + number / 20)
        status = "done" if number < 4 else "stopped" if number < 8 else "failed" if number == 8 else "running"
        ended = {"status": status, "error": "ValueError: no" if status == "failed" else None}
        if status == "done":
            ended |= {"mean": 0.5 + number / 10, "seconds": 60.0}
        if status != "running":
            when = {"date": f"2026-01-01T00:{number:02d}:00+00:00"}
            ledger.add(row.id, "x", status, trial=dataclasses.replace(row, **ended), **when)
    return tmp_path


def test_it_tells_of_states_rate_best_and_failures(study, capsys):
    now = standing(study)
    assert now.counts == {"done": 4, "stopped": 4, "failed": 1, "running": 1, "pending": 10}
    assert now.seconds_left == 11 * 60 and now.gpus == 0.5 and now.driver is None
    assert [row.id for row in now.best] == ["p3", "p2", "p1", "p0"]
    assert "nobody runs it; the same mixcl tune command goes on" in text(now)
    (study / ".lock").write_text("node7 4711")
    assert "process 4711 of node7 runs it, 0.5 GPUs in use" in text(standing(study))
    assert main(["tune", "--watch", str(study)]) == 0
    shown = capsys.readouterr().out
    assert "11:00 left" in shown and "Dice 0.800  p3" in shown and "p8: ValueError: no" in shown


def test_of_one_that_has_ended_it_says_so_and_names_what_is_next(study):
    rows = tuple(row for row in standing(study).rows if row.status != "running")
    ended = dataclasses.replace(standing(study), rows=rows, planned=len(rows), seconds_left=0.0, gpus=0.0)
    assert "of 9 trials\n  all have ended; mixcl report makes a page of them\n" in text(ended)


def test_without_a_study_or_what_it_needs_it_says_so(tmp_path, capsys):
    assert main(["tune", "--watch", str(tmp_path)]) == 2
    with pytest.raises(SystemExit):
        main(["tune", "--study", str(tmp_path)])
    assert "--data is missing; give --data, --from and --study, or --watch alone" in capsys.readouterr().err


def test_the_page_of_a_running_search_says_what_was_searched_and_saved(study):
    found = search_results(open_study(study))
    assert found.stopped == 4 and found.saved == pytest.approx(4 * 750 / 8000) and found.step == 250
    assert len(found.judged) == 10 and found.shares["finetune.learning_rate"] > 0.9
    page = write_report(study).read_text()
    assert "What was searched?" in page and "10 pending" in page and "about 11 min 00 s left" in page
    assert "The best of 4 finished trials of 20 has a Dice of 80.0 %" in page
    assert "saved 37.5 % of the steps" in page


def test_a_search_from_scratch_alone_has_no_column_of_differences(study):
    write_report(study)
    page = (study / "report" / "index.html").read_text()
    assert ">Difference<" not in page and "difference from scratch" not in page
    assert "finetune.learning_rate 0.0001778<br>" in page  # four digits; the whole is in report.json


def test_a_setting_that_does_not_matter_has_no_share_and_one_that_bends_has():
    rng = random.Random(0)
    values = [(rng.random(), rng.random()) for _ in range(60)]
    judged = [Judged(str(n), {"a": a, "b": b}, 1 - (a - 0.5) ** 2, "done") for n, (a, b) in enumerate(values)]
    assert share_of(judged, "a") > 0.5 and share_of(judged, "b") < 0.1
    assert share_of(judged[:1], "a") == 0 and share_of(judged, "c") == 0
