"""What a run leaves as JSON is read as it was written, and whatever is wrong with it is said in one line."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixcl_dist.config import Config, replace, to_yaml
from mixcl_dist.errors import MixclError, RunError
from mixcl_dist.export import export
from mixcl_dist.finetuning.finetune import finetune
from mixcl_dist.finetuning.start import initial_network, like
from mixcl_dist.jsonfiles import append_line, write_json
from mixcl_dist.pretraining.pretrain import pretrain
from mixcl_dist.pretraining.probe import probe_run
from mixcl_dist.records import (
    CurvePoint,
    DiceRecord,
    FinetuneRecord,
    NetworkRecord,
    PretrainRecord,
    ProbeRecord,
    ProbeScans,
    ProbeScores,
    RunPlan,
    RunRecord,
    Scores,
    StudyRecord,
    TrialRecord,
    read_curve,
    read_metrics,
)
from mixcl_dist.report import study_table, table_text, write_report
from mixcl_dist.settings import NetworkConfig
from mixcl_dist.studies import ledger
from mixcl_dist.studies import study as study_module
from mixcl_dist.studies.study import run_study
from mixcl_dist.studies.table.runner import run_table

from ..conftest import ROOT
from .studies.table.small_table import ARMS, FINISH, STAGES, WORKER

FORM = {"network.filters": [4, 6, 8], "network.voxel_dim": 8, "network.crop_dim": 8}
STEPS = {"finetune.steps": 2, "finetune.patch_size": [16, 16, 16], "finetune.batch_size": 1, "finetune.curve_every": 1}
FEW, MANY = 6, 120
"""Faults of each file."""
KEPT_BACK = {"budget.development": ["abdomen_000", "abdomen_001"]}
STUDY = {"study.fractions": [0.5], "study.seeds": [0]}
TABLE = {"scans": [1], "seeds": [0], "stages": STAGES, "arms": {name: ARMS[name] for name in ("scratch", "mixcl")}}
WRONG: tuple[Any, ...] = (
    *(None, True, -1, 17, 0, 1e308, 10**400, math.nan, math.inf, "", "x", "1", "../..", "a\x00b", "$\\frac$"),
    *([], {}, [[]], [None], {"": None}, "2026-01-01", "\ud800", "$__import__('os')"),
)


@pytest.fixture(scope="module")
def runs(shards, data, small_config, tmp_path_factory) -> Path:
    """The folders of a pre-training, a fine-tuning, a study and a table, made by the real verbs; another program stands
    for the table's items."""
    folder = tmp_path_factory.mktemp("runs")
    config = replace(small_config, FORM | STEPS | STUDY | {"budget.fraction": 0.5, "pretrain.steps": 1})
    kept_back = replace(config, KEPT_BACK)
    pretrain(kept_back, shards=shards, run=folder / "pre")
    finetune(kept_back, data=data, start=None, run=folder / "few")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, "run_trials", _at_once)
        run_study(config, data=data, starts=[], study=folder / "study")
    (folder / "worker.py").write_text(WORKER + FINISH)
    of_table = replace(config, {"table": TABLE, "budget.fraction": 0.0})
    run_table(of_table, data=data, shards=shards, out=folder / "table", workers=4, command=_stand_in(folder))
    return folder


def _stand_in(folder: Path):
    return lambda out, name: [sys.executable, "-S", str(folder / "worker.py"), str(out), name]


def _at_once(function, trials, *, ended, reported, **options):
    for trial in trials:
        ended(study_module.Outcome(trial, function(trial, lambda figures, trial=trial: reported(trial, figures))))


def verbs(runs: Path, config: Config, shards: Path, data: Path) -> dict[str, Any]:
    """What each verb does with a run folder, without the training."""
    study = replace(config, FORM | STEPS | STUDY | {"budget.fraction": 0.5, "pretrain.steps": 1})
    kept_back = replace(study, KEPT_BACK)
    return {
        "report pre": lambda: write_report(runs / "pre"),
        "report few": lambda: write_report(runs / "few"),
        "report study": lambda: (write_report(runs / "study"), study_table(runs / "study")),
        "export pre": lambda: export(runs / "pre", "nnunet", runs / "out"),
        "export few": lambda: export(runs / "few", "bundle", runs / "out"),
        "finetune --from": lambda: initial_network(like(config, runs / "pre"), runs / "pre", 1),
        "finetune": lambda: finetune(study, data=data, start=None, run=runs / "few"),
        "tune": lambda: run_study(study, data=data, starts=[], study=runs / "study"),
        "probe": lambda: probe_run(runs / "pre", kept_back, shards=shards),
        "report table": lambda: (write_report(runs / "table"), table_text(runs / "table")),
        "table": lambda: run_table(
            replace(study, {"table": TABLE, "budget.fraction": 0.0}),
            data=data,
            shards=shards,
            out=runs / "table",
            seconds=0,
            command=_stand_in(runs),
        ),
        "pretrain --resume": lambda: pretrain(kept_back, shards=shards, run=runs / "pre", resume=True),
        "pretrain --start": lambda: pretrain(kept_back, shards=shards, run=runs / "next", start=runs / "pre"),
    }


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Of every key and entry in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def damaged(text: str, rng: random.Random) -> str:
    """A JSON file, or one of its lines, with one fault."""
    how = rng.choice(["value"] * 6 + ["delete"] * 3 + ["cut", "version", "bytes"])
    if how == "cut":
        return text[: rng.randrange(len(text))]
    if how == "bytes":
        at = rng.randrange(len(text))
        return text[:at] + rng.choice("\x00}{[\"',:9é") + text[at + 1 :]
    lines = text.splitlines() if text.count("\n{") else [text]
    number = rng.randrange(len(lines))
    content = copy.deepcopy(json.loads(lines[number]))
    *way, last = rng.choice(list(places(content)))
    holder = content
    for key in way:
        holder = holder[key]
    if how == "delete":
        del holder[last]
    elif how == "version":
        content["format"] = 99
    else:
        holder[last] = rng.choice(WRONG)
    lines[number] = json.dumps(content)
    return "\n".join(lines) + "\n"


READ_BY = {
    "pre/run.json": ("report pre", "export pre", "finetune --from", "pretrain --resume", "pretrain --start"),
    "pre/network.json": ("report pre", "export pre", "finetune --from", "probe", "pretrain --start"),
    "pre/metrics.jsonl": ("report pre",),
    "few/run.json": ("report few", "export few"),
    "few/network.json": ("report few", "export few"),
    "few/dice.json": ("report few", "export few"),
    "few/metrics.jsonl": ("report few",),
    "study/study.json": ("report study", "tune"),
    "study/ledger.jsonl": ("report study", "tune"),
    "study/trials/scratch-0.5-s0/run.json": ("report study", "tune"),
    "study/trials/scratch-0.5-s0/dice.json": ("report study", "tune"),
    "table/plan.json": ("report table", "table"),
    "table/ledger.jsonl": ("report table", "table"),
    "table/trial/mixcl-n1-s0/dice.json": ("report table", "table"),
}


class Stopped(Exception):
    """A verb has read all that it reads, and would begin to learn."""


@pytest.fixture
def without_learning(monkeypatch):
    def stop(*arguments, **options):
        raise Stopped

    for place in ("pretraining.pretrain._launch", "finetuning.finetune._train", "pretraining.probe.read_patches"):
        monkeypatch.setattr(f"mixcl_dist.{place}", stop)
    monkeypatch.setattr(study_module, "run_trials", stop)


def refusal(verb) -> str | None:
    """The one line with which a verb refuses, None where it does not; any other exception goes through."""
    try:
        verb()
    except Stopped:
        return None
    except MixclError as error:
        return str(error)
    return None


def try_faults(file: str, count: int, runs: Path, there: Path, make_verbs) -> int:
    """Damage a file so many times; every verb that reads it works or refuses in one line. Returns how often one
    refused."""
    shutil.copytree(runs, there)
    whole, verbs = (there / file).read_text(), make_verbs(there)
    rng, refused = random.Random(file), 0
    for _ in range(count):
        text = damaged(whole, rng)
        for name in READ_BY[file]:
            (there / file).write_bytes(text.encode("utf-8", "surrogatepass"))
            try:
                said = refusal(verbs[name])
            except Exception as error:
                raise AssertionError(f"{name}: {file} with {text[:3000]}") from error
            refused += said is not None
            assert said is None or (said.count("\n") == 0 and str(there) in said), f"{name}: {said}"
            shutil.rmtree(there / "out", ignore_errors=True)
    return refused


@pytest.mark.parametrize("file", READ_BY)
@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_damaged_file_is_refused_in_one_line_by_every_verb_that_reads_it(
    file, count, runs, small_config, shards, data, tmp_path, without_learning, monkeypatch
):
    if count == FEW:
        monkeypatch.setattr("mixcl_dist.report.figures._svg", lambda *arguments: "")
    refused = try_faults(file, count, runs, tmp_path / "runs", lambda there: verbs(there, small_config, shards, data))
    assert refused > 0


RECORDS = (
    PretrainRecord(name="run", finished=None, label_cases=("a",), warnings={"probe": "it — collapsed"}),
    FinetuneRecord(
        name="run", finished="2026-01-01", label_cases=(), fraction=0.1, seed=-3, spacing_mm=(1.0, 2.0, 2.5)
    ),
    NetworkRecord.of(NetworkConfig(), {"network.safetensors": b"x"}, spacing_mm=None, classes=("liver",)),
    DiceRecord(
        classes=("liver", "aorta"),
        cases={"v": {"liver": 0.5, "aorta": None}},
        class_mean={"liver": 0.5, "aorta": None},
        mean=0.5,
        hd95_mm=Scores(classes=("liver",), cases={"v": {"liver": 12.5}}, class_mean={"liver": 12.5}, mean=12.5),
    ),
    StudyRecord(
        name="s", starts=("scratch",), trials=(TrialRecord(id="a", start="scratch", fraction=0.1, seed=0, run="a"),)
    ),
    ProbeRecord(
        linear=ProbeScores(mean=0.5, dice={"liver": 0.5}),
        knn=ProbeScores(mean=None, dice={"liver": None}),
        scans=ProbeScans(fitted=2, judged=1),
    ),
)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_is_read_as_it_was_written(record, tmp_path):
    record.save(tmp_path)
    assert type(record).load(tmp_path) == record
    json.loads((tmp_path / record.FILE).read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_written_as_null_and_read_as_nothing(tmp_path, number):
    append_line(tmp_path / "metrics.jsonl", {"step": 1, "loss": number, "rate": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "rate": 0.5}]
    append_line(tmp_path / "curve.jsonl", {"step": 1, "mean": number, "dice": {"liver": number}})
    assert read_curve(tmp_path / "curve.jsonl") == [CurvePoint(step=1, mean=None, dice={"liver": None})]
    write_json(tmp_path / "x.json", {"a": [number, {"b": (number,)}]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, {"b": [None]}]}


@pytest.mark.parametrize(
    ("known", "instead"),
    [
        ('"mean": 0.5', '"mean": 17'),
        ('"mean": 0.5', '"mean": NaN'),
        ('"mean": 0.5', '"mean": "0.5"'),
        ('"mean": 0.5', '"average": 0.5'),
        ('"format": 1', '"format": 2'),
        ('"aorta"\n ]', '"spleen"\n ]'),
    ],
)
def test_what_is_wrong_is_said_with_file_key_and_cure(tmp_path, known, instead):
    RECORDS[3].save(tmp_path)
    text = (tmp_path / "dice.json").read_text()
    assert known in text
    (tmp_path / "dice.json").write_text(text.replace(known, instead, 1))
    with pytest.raises(RunError) as refusal:
        DiceRecord.load(tmp_path)
    line = str(refusal.value)
    assert line.startswith(str(tmp_path / "dice.json")) and line.endswith("remove it and fine-tune again")


def test_a_trial_lies_inside_its_study(tmp_path):
    """A stranger's study must not show the settings of another folder."""
    for run in ("../private", "/private", "trials/../../private"):
        content = RECORDS[4].content()
        content["trials"][0]["run"] = run
        write_json(tmp_path / "study.json", content)
        with pytest.raises(RunError, match=r"study.json: trials.0.run is .*: leads out of this folder; "):
            StudyRecord.load(tmp_path)


def test_only_the_text_after_the_last_line_is_a_killed_writers(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1}]
    file.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(
        RunError, match=r"metrics.jsonl: line 1: cannot be read .*; remove the line, or move the folder away"
    ):
        read_metrics(file)


def test_one_flipped_byte_of_the_weights_is_refused_by_every_verb_that_loads_them(
    runs, small_config, shards, data, tmp_path, without_learning
):
    shutil.copytree(runs, tmp_path / "runs")
    for folder, file, names in (
        ("pre", "network.safetensors", ("finetune --from", "export pre", "probe")),
        ("pre", "pretrain.safetensors", ("pretrain --start",)),
        ("few", "model.safetensors", ("export few",)),
    ):
        path = tmp_path / "runs" / folder / file
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for name in names:
            said = refusal(verbs(tmp_path / "runs", small_config, shards, data)[name])
            assert said.startswith(f"{path}: content differs from its digest in network.json; "), name
        path.write_bytes(whole)


def test_a_pretraining_that_was_killed_before_its_first_record_is_begun_by_the_same_command(
    shards, small_config, tmp_path, without_learning
):
    (tmp_path / "config.yaml").write_text(to_yaml(small_config))
    for resume in (False, True):
        with pytest.raises(Stopped):
            pretrain(small_config, shards=shards, run=tmp_path, resume=resume)


def test_committed_results_of_earlier_versions_are_still_read():
    results = ROOT / "benchmarks" / "results"
    for seed in range(3):
        assert PretrainRecord.read(results / "openkbp" / f"pretrained-s{seed}.json").finished
        assert read_metrics(results / "openkbp" / f"metrics-s{seed}.jsonl")
    assert StudyRecord.read(results / "openkbp" / "study.json").trials
    assert len(ledger.read(results / "few_label" / "cpu" / "ledger.jsonl")) > 3
    curves = [read_curve(file) for file in (results / "few_label" / "cpu").glob("curve-*.jsonl")]
    assert len(curves) == 6 and all(curves)


def test_a_run_of_another_kind_is_not_taken_for_it(tmp_path):
    RECORDS[1].save(tmp_path)
    assert RunRecord.load(tmp_path) == RECORDS[1]
    with pytest.raises(RunError, match=r"run.json: kind is 'finetune', not pretrain; move the folder away"):
        PretrainRecord.load(tmp_path)


def follow(said: str, file: Path) -> None:
    """Do to a file what a message says."""
    if number := re.search(r": line (\d+): .* remove the line", said):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[: int(number[1]) - 1] + lines[int(number[1]) :]))
    elif "; remove it and " in said:
        file.unlink()
    else:
        assert said.endswith("; move the folder away and make it again"), said
        file.parent.rename(file.parents[2] / "away")


TRIAL = "trials/scratch-0.5-s0"


@pytest.mark.parametrize("name", ["study.json", "ledger.jsonl", f"{TRIAL}/run.json", f"{TRIAL}/dice.json"])
def test_a_study_is_mended_as_it_is_said_and_comes_to_its_end(
    name, runs, small_config, shards, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(study_module, "run_trials", _at_once)
    monkeypatch.setattr("mixcl_dist.report.figures._svg", lambda *arguments: "")
    there = shutil.copytree(runs, tmp_path / "runs")
    file, made = there / "study" / name, verbs(there, small_config, shards, data)
    file.write_text("{\n")
    follow(refusal(made["report study"]), file)
    assert refusal(made["tune"]) is None and refusal(made["report study"]) is None
    assert [trial.status for trial in StudyRecord.load(there / "study").trials] == ["done"]
    assert (there / "study" / TRIAL / "dice.json").exists()


@pytest.mark.parametrize("name", ["ledger.jsonl", "trial/mixcl-n1-s0/dice.json", "plan.json"])
def test_a_table_is_mended_as_it_is_said_and_comes_to_its_end(
    name, runs, small_config, shards, data, tmp_path, monkeypatch
):
    monkeypatch.setattr("mixcl_dist.report.figures._svg", lambda *arguments: "")
    there = shutil.copytree(runs, tmp_path / "runs")
    file, out = there / "table" / name, there / "table"
    file.write_text("{\n")
    said = refusal(lambda: write_report(out))
    if name == "plan.json":
        assert said.endswith("; give the same mixcl table command with another --out")
        out = there / "other"
    else:
        follow(said, file)
    settings = FORM | STEPS | STUDY | {"pretrain.steps": 1, "table": TABLE, "budget.fraction": 0.0}
    ending = run_table(
        replace(small_config, settings), data=data, shards=shards, out=out, workers=4, command=_stand_in(there)
    )
    assert (ending.done, ending.failed) == (ending.planned, ())
    assert write_report(out).exists()


@pytest.mark.parametrize(
    ("kind", "cure"),
    [
        (RunRecord, "give the folder of a finished run"),
        (StudyRecord, "give the --study of a mixcl tune that has begun"),
        (RunPlan, "write it first: mixcl plan … --out PLAN.json"),
    ],
)
def test_a_file_that_is_not_there_is_refused_with_what_makes_it(tmp_path, kind, cure):
    with pytest.raises(RunError, match=f"no such file; {re.escape(cure)}$"):
        kind.read(tmp_path / "absent.json")
