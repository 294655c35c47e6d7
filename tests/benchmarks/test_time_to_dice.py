"""One clock from an empty folder to a Dice: what it counts, when it stops, and what is kept of it."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mixcl_dist.profiling.result import Result
from mixcl_dist.records import CurvePoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def program():
    """The benchmark itself, as a module."""
    spec = importlib.util.spec_from_file_location("time_to_dice", ROOT / "benchmarks" / "time_to_dice" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mixcl(program, monkeypatch, tmp_path):
    """Stands in for `mixcl`: a program that notes its words; fine-tuning runs the lines that it is given."""

    def stand_in(finetuning):
        (tmp_path / "mixcl_dist.py").write_text(
            textwrap.dedent(
                f"""
                import json, pathlib, sys, time
                with open({str(tmp_path / "words")!r}, "a") as file:
                    file.write(json.dumps(sys.argv[1:]) + "\\n")
                if sys.argv[1] == "finetune":
                    run = pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
                    run.mkdir(parents=True)
                    def point(step, mean):
                        with open(run / "curve.jsonl", "a") as file:
                            file.write(json.dumps(dict(step=step, mean=mean)) + "\\n")
                """
            )
            + textwrap.indent(finetuning, "    ")
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.chdir(tmp_path)  # where `python -m` looks first
        return program.Task(0.3, Path("dataset.json"), ROOT / "benchmarks" / "time_to_dice" / "task.yaml", "few_label")

    return stand_in


def test_the_trial_is_ended_at_the_first_point_that_reaches_the_dice(program, mixcl, tmp_path):
    task = mixcl("point(50, 0.2); point(100, 0.31); time.sleep(3600)")
    seconds, point = program.attempt(task, tmp_path / "out")
    assert (point.step, point.mean) == (100, 0.31)
    assert list(seconds) == ["build", "pre-training", "fine-tuning"] and all(took > 0 for took in seconds.values())
    words = [json.loads(line) for line in (tmp_path / "words").read_text().splitlines()]
    assert [each[0] for each in words] == ["shards", "pretrain", "finetune"]
    assert all(each[each.index("--recipe") + 1] == "few_label" for each in words)


def test_a_trial_that_never_reaches_it_ends_by_itself_and_has_no_time_to_dice(program, mixcl, tmp_path):
    task = mixcl("point(50, None); point(100, 0.29)")
    _, point = program.attempt(task, tmp_path / "out")
    assert point.step == 100 and not program.is_reached(point, task.dice)
    assert program.said(12.0, point, task.dice).startswith("Dice 0.3 was not reached: 0.290 at step 100")
    assert program.said(12.0, None, task.dice) == "No Dice was measured in 12 s."


def test_a_command_that_fails_ends_the_benchmark(program, mixcl, tmp_path):
    task = mixcl("raise SystemExit(2)")
    with pytest.raises(SystemExit, match="mixcl finetune ended with exit code 2"):
        program.attempt(task, tmp_path / "out")


def test_the_task_is_called_by_all_of_its_settings(program, tmp_path):
    task = program.openkbp(tmp_path)
    assert task.digest == program.openkbp(Path("elsewhere")).digest
    text = task.settings.read_text()
    (tmp_path / "task.yaml").write_text(text.replace("steps: 400", "steps: 500"))
    assert task._replace(settings=tmp_path / "task.yaml").digest != task.digest != task._replace(dice=0.4).digest


def test_rows_of_a_record_have_one_head_and_no_path(program, monkeypatch, tmp_path):
    monkeypatch.setattr(program, "RECORD", tmp_path / "results" / "record.csv")
    figures = {name: program.Figure(unit="s", better="less", samples=(2.4,)) for name in ("build", program.TOTAL)}
    environment = program.ended(program.environment())
    result = Result(benchmark="time_to_dice", command=(), environment=environment, figures=figures)
    for _ in range(2):
        program.add_row(result, CurvePoint(step=100, mean=0.3141), program.openkbp(Path("ct")))
    with program.RECORD.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and rows[0] == rows[1] and rows[0]["dice"] == "0.314"
    assert rows[0]["time to Dice (s)"] == "2" and rows[0]["commit"] == result.environment.commit
    assert not any("/" in value for value in rows[0].values() if value != rows[0]["machine"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--ct: give the folder of the public scans"),
        (["--quick", "--record"], "--record: --quick is another task"),
        (["--quick", "--out", "."], "the clock begins with an empty folder"),
    ],
)
def test_what_would_be_no_measurement_is_refused(program, words, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit):
        program.main()
    assert says in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_way_runs_on_a_phantom_behind_the_front_door(tmp_path):
    out = tmp_path / "now.json"
    command = [sys.executable, "-m", "benchmarks", "time_to_dice", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = Result.read(out)
    assert set(result.figures) == {"build", "pre-training", "fine-tuning", "time to Dice"} and result.quick
    parts = [figure.samples[0] for name, figure in result.figures.items() if name != "time to Dice"]
    assert result.figures["time to Dice"].samples[0] == pytest.approx(sum(parts))
    assert "at step 2 of fine-tuning" in result.said and out.with_suffix(".html").exists()
