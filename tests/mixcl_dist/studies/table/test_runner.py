"""The few-label table is run: what bars a trial, what an item's digest is of, and going on after any interruption."""

from __future__ import annotations

import ast
import json
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import pytest

from mixcl_dist.config import ConfigError, from_dict, load, replace, to_dict
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.building.processes import in_this_process
from mixcl_dist.data_shards.building.settings import BuildConfig
from mixcl_dist.data_shards.sources import open_source
from mixcl_dist.errors import RunError
from mixcl_dist.report import table_text, write_report
from mixcl_dist.run import Stopped
from mixcl_dist.studies import ledger
from mixcl_dist.studies.table import runner
from mixcl_dist.studies.table.plan import plan
from mixcl_dist.studies.table.runner import run_table
from mixcl_dist.studies.table.work import work

from .small_table import ARMS, FINISH, STAGES, WORKER

TELL = "tells of a run"


REFUSE = "refuses a run, or lets it be"


SHARDS = "shards are made before, and the digest is of their manifest, which has the digest of every byte"


STORAGE = tuple(f"data_shards/storage/{name}.py" for name in ("__init__", "store", "publishing", "folder", "remote"))


APART = {
    **dict.fromkeys(("config.py", "settings.py"), "its values are in the digest"),
    **dict.fromkeys(("run.py", "records.py", "jsonfiles.py", "progress.py", "trackers.py"), TELL),
    **dict.fromkeys(("errors.py", "data_shards/errors.py", "cluster/errors.py"), TELL),
    **dict.fromkeys((f"pretraining/{name}.py" for name in ("recorder", "alarms", "diagnostics")), TELL),
    **dict.fromkeys(("seen.py", "data_shards/building/dedup.py"), REFUSE),
    **dict.fromkeys(("data_shards/building/settings.py", *STORAGE), SHARDS),
    **dict.fromkeys(
        tuple(f"cluster/{name}.py" for name in ("group", "installation", "meeting", "stopping", "watchdog")),
        "says who takes part, with what code, and until when",
    ),
    **dict.fromkeys(
        ("cluster/checkpoint.py", "cluster/snapshot.py", "pretraining/saving.py"),
        "stores what it is given, whole or not at all",
    ),
}


BEGUN_WITH = {
    "pretrain": "pretraining/pretrain",
    **dict.fromkeys(("supervised", "trial"), "finetuning/finetune"),
    "probe": "pretraining/probe",
}


def first_party(path: Path) -> set[Path]:
    """Modules of the package that a module imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mixcl_dist":
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = [runner.ROOT.parent / name.replace(".", "/") for name in found]
    return {f for file in files for f in (file.with_suffix(".py"), file / "__init__.py") if f.exists()}


@pytest.mark.parametrize("kind", BEGUN_WITH)
def test_the_digest_is_of_every_module_that_a_figure_depends_on(kind):
    apart = set(APART) | ({"pretraining/probe.py"} if kind == "pretrain" else set())  # there it tells of a run
    reached, to_read = set(), [runner.ROOT / f"{BEGUN_WITH[kind]}.py"]
    while to_read:
        path = to_read.pop()
        name = str(path.relative_to(runner.ROOT))
        if name not in reached | apart:
            reached.add(name)
            to_read += first_party(path)
    listed = {str(path.relative_to(runner.ROOT)) for glob in runner.SOURCES[kind] for path in runner.ROOT.glob(glob)}
    assert {name for name in reached if (runner.ROOT / name).read_text()} - {"__init__.py"} <= listed
    assert all((runner.ROOT / name).exists() for name in apart)


@pytest.fixture
def stub(tmp_path):
    """A function that makes the program that stands for an item; `body` is run before it leaves its result."""

    def make(body: str = ""):
        program = tmp_path / f"worker{len(list(tmp_path.glob('worker*')))}.py"
        program.write_text(WORKER + textwrap.dedent(body) + FINISH)
        return lambda out, name: [sys.executable, "-S", str(program), str(out), name]

    return make


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runner, "LOOK_EVERY", 0.01)


@pytest.fixture
def small_table(small_config):
    def make(**changes):
        section = {"scans": [1], "seeds": [0], "stages": STAGES, "arms": {k: ARMS[k] for k in ("scratch", "mixcl")}}
        return from_dict(to_dict(small_config) | {"table": section | changes})

    return make


@pytest.fixture
def go(cohort, shards, tmp_path):
    """Run a table of the phantom cohort in one folder."""

    def run(config, command, **how):
        return run_table(config, data=cohort[0], shards=shards, out=tmp_path / "table", command=command, **how)

    return run


@pytest.fixture(scope="module")
def openkbp_shards(ct, tmp_path_factory):
    folder = tmp_path_factory.mktemp("openkbp") / "shards"
    build([ct / "openkbp"], folder, load(recipe="few_label").build)
    return folder


def order(tmp_path) -> list[str]:
    file = tmp_path / "table" / "order"
    return file.read_text().split() if file.exists() else []


def test_a_table_is_run_in_order_and_written_down(go, small_table, stub, tmp_path):
    ending = go(small_table(), stub())
    assert (ending.done, ending.planned, ending.failed, ending.left) == (2, 2, (), ())
    assert order(tmp_path) == list(plan(small_table()))
    records = {record["item"]: record for record in ledger.read(tmp_path / "table" / "ledger.jsonl")}
    assert {record["status"] for record in records.values()} == {"done"}
    trial = records["trial/mixcl-n1-s0"]
    assert trial["mean"] == 0.6 and trial["seconds"] >= 0 and trial["digest"] and trial["machine"]["cores"]


def test_called_again_nothing_is_run_twice(go, small_table, stub, tmp_path):
    go(small_table(), stub())
    before = order(tmp_path)
    assert go(small_table(), stub()).done == 2
    assert order(tmp_path) == before


def test_items_run_side_by_side(go, small_table, stub, tmp_path):
    body = """
    if kind == "trial":
        while (out / "order").read_text().count("trial/") < 2: time.sleep(0.01)
    """
    ending = go(small_table(arms={"scratch": {}}, first_arms=[], seeds=[0, 1]), stub(body), workers=2)
    assert ending.done == 2


def test_a_failed_item_has_its_last_line_stops_no_other_and_is_tried_again(go, small_table, stub, tmp_path):
    body = "if name == 'pretrain/identity': sys.exit(print('what follows') or 'OSError: disk full')"
    ending = go(small_table(), stub(body))
    assert ending.failed == ("pretrain/identity",) and ending.done == 1 and ending.left == ("trial/mixcl-n1-s0",)
    records = {record["item"]: record for record in ledger.read(tmp_path / "table" / "ledger.jsonl")}
    assert records["pretrain/identity"]["text"] == "OSError: disk full"
    assert go(small_table(), stub()).done == 2


@pytest.mark.parametrize("error", [RunError("DIR: why; cure"), Stopped("DIR: stopped as asked")])
def test_an_item_that_is_refused_or_stopped_says_so_in_one_line(monkeypatch, error):
    monkeypatch.setattr("mixcl_dist.studies.table.work.work", mock.Mock(side_effect=error))
    monkeypatch.setattr(sys, "argv", ["table", "DIR", "trial/scratch-n1-s0"])
    with pytest.raises(SystemExit, match=f"^{error}$"):
        runpy.run_module("mixcl_dist.studies.table", run_name="__main__")


def test_no_trial_runs_from_a_pretraining_that_its_probe_does_not_speak_for(go, small_table, stub, tmp_path, capsys):
    ending = go(small_table(), stub("probe['linear']['mean'] = 0.31 if stage == 'mixcl' else 0.3"))
    assert ending.barred == ("trial/mixcl-n1-s0",) and ending.done == 1 and not ending.failed
    assert "trial/mixcl-n1-s0" not in order(tmp_path)
    records = {record["item"]: record for record in ledger.read(tmp_path / "table" / "ledger.jsonl")}
    probes = records["trial/mixcl-n1-s0"]["probes"]
    assert probes == {"probe/mixcl-n1-s0": 0.31, "probe/random": 0.3, "probe/reconstruction": 0.3}
    assert "barred: probe/mixcl-n1-s0 0.310 is not 0.02 above" in capsys.readouterr().err
    assert go(small_table(), stub()).barred == ("trial/mixcl-n1-s0",)  # and is told of again, but recorded once
    statuses = [record["status"] for record in ledger.read(tmp_path / "table" / "ledger.jsonl")]
    assert statuses.count("barred") == 1


def test_a_barred_arm_pays_for_its_gate_alone(go, small_table, stub, tmp_path):
    """Three seeds: that of the first is judged; the others' pre-trainings would be for trials that never run."""
    below, above = "probe['linear']['mean'] = 0.3", ""
    config = small_table(seeds=[0, 1, 2])
    ending = go(config, stub(below), workers=4)
    assert len(ending.barred) == 3 and ending.done == 3 and not ending.left
    assert [name for name in order(tmp_path) if name.startswith("pretrain/mixcl")] == ["pretrain/mixcl-n1-s0"]
    (tmp_path / "table" / "ledger.jsonl").unlink()
    assert go(config, stub(above), workers=4).done == 6  # where it is let through, all of them are made


def test_no_more_pretrainings_than_asked_for_run_at_once(go, small_table, stub, tmp_path):
    body = """
    if kind == "pretrain":
        (out / f"at-{stage}").touch()
        time.sleep(0.3)
        (out / "most").open("a").write(f"{len(list(out.glob('at-*')))} ")
        (out / f"at-{stage}").unlink()
    """
    go(small_table(), stub(body), workers=4, pretrainings=1)
    assert set((tmp_path / "table" / "most").read_text().split()) == {"1"}


def test_a_probe_that_judged_no_class_has_failed_and_stops_no_other(go, small_table, stub, tmp_path):
    ending = go(small_table(), stub("probe['linear']['mean'] = None if stage == 'random' else 0.3"))
    assert ending.failed == ("probe/random",) and ending.done == 1 and ending.left == ("trial/mixcl-n1-s0",)
    records = {record["item"]: record for record in ledger.read(tmp_path / "table" / "ledger.jsonl")}
    assert "no class was probed" in records["probe/random"]["text"]


def test_nothing_is_begun_that_would_outlast_the_time(go, small_table, stub, tmp_path):
    slow = stub("time.sleep(0.5 * (kind == 'trial'))")
    config = small_table(arms={"scratch": {}}, first_arms=[], seeds=[0, 1, 2, 3])
    go(config, slow, only="trial/*-s0")
    ending = go(config, slow, seconds=0.4)  # the first took over half a second
    assert ending.done == 1 and len(ending.left) == 3
    assert order(tmp_path) == ["trial/scratch-n1-s0"]


def test_what_runs_over_the_time_is_ended_and_begun_anew(go, small_table, stub, tmp_path):
    config = small_table(arms={"scratch": {}}, first_arms=[])
    ending = go(config, stub("time.sleep(60)"), seconds=1)
    assert ending.left == ("trial/scratch-n1-s0",)
    assert go(config, stub()).done == 1
    statuses = [record["status"] for record in ledger.read(tmp_path / "table" / "ledger.jsonl")]
    assert statuses == ["begun", "begun", "done"]


def test_only_what_is_asked_for_is_run_with_what_it_needs(go, small_table, stub, tmp_path):
    ending = go(small_table(), stub(), only="*/identity")
    assert order(tmp_path) == ["pretrain/identity"] and ending.planned == 2
    with pytest.raises(RunError, match=r"--only trial/mixxcl.*: matches no item, .*arms: scratch, mixcl"):
        go(small_table(), stub(), only="trial/mixxcl*")


def test_what_other_settings_made_is_made_again_and_the_old_put_aside(go, small_table, stub, tmp_path, monkeypatch):
    config = small_table(arms={"scratch": {}}, first_arms=[])
    go(config, stub())
    monkeypatch.setitem(runner.SOURCES, "trial", ("scoring.py",))  # as if the sources had changed
    assert go(config, stub()).done == 1
    assert len(order(tmp_path)) == 2
    assert len(list((tmp_path / "table" / "superseded").iterdir())) == 1


def test_settings_may_be_changed_to_and_fro(go, small_table, stub, tmp_path, capsys):
    """And the plan has the digests of those that are in force, so that a report knows what is stale."""
    config = small_table(arms={"scratch": {}}, first_arms=[])
    digests = []
    for steps in (4, 5, 4, 5):
        assert go(replace(config, {"finetune.steps": steps}), stub()).done == 1
        (item,) = json.loads((tmp_path / "table" / "plan.json").read_text())["items"]
        newest = list(ledger.read(tmp_path / "table" / "ledger.jsonl"))[-1]
        assert newest["digest"] == item["digest"]
        digests.append(item["digest"])
    assert digests[0] == digests[2] != digests[1] == digests[3]
    assert len(list((tmp_path / "table" / "superseded").iterdir())) == 3
    assert capsys.readouterr().err.count("1 items were made by other sources or settings and are made again") == 3


def test_a_pretraining_whose_files_are_gone_is_made_again_only_where_a_trial_needs_it(go, small_table, stub, tmp_path):
    go(small_table(), stub())
    (tmp_path / "table" / "pretrain" / "identity" / "network.safetensors").unlink()
    go(small_table(), stub())
    assert order(tmp_path).count("pretrain/identity") == 1
    for name in ("trial/mixcl-n1-s0/dice.json", "pretrain/mixcl-n1-s0/network.safetensors"):
        (tmp_path / "table" / name).unlink()
    go(small_table(), stub())
    assert order(tmp_path).count("pretrain/identity") == 2


def test_a_folder_of_another_table_is_refused(go, small_table, stub, cohort, shards, tmp_path):
    go(small_table(), stub())
    with pytest.raises(RunError, match="holds a table of other trials; give another --out"):
        go(small_table(seeds=[0, 1]), stub())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("")
    with pytest.raises(RunError, match="full: holds other files"):
        run_table(small_table(), data=cohort[0], shards=shards, out=tmp_path / "full", command=stub())


def test_what_the_data_cannot_give_is_refused_before_anything_is_run(go, small_table, stub, tmp_path):
    with pytest.raises(ConfigError, match=r"budget.scans 9: .* has \d labelled training scans .*; give at most \d"):
        go(small_table(scans=[1, 9]), stub())
    others = {"folds": {"A": {"known": ["liver"], "new": ["gizzard"]}}, "arms": {"scratch": {}}}
    with pytest.raises(ConfigError, match=r"folds.A: there is no class gizzard; classes: .*liver"):
        go(small_table(other_organs=others), stub())
    with pytest.raises(ConfigError, match=r"budget.development: there is no case nobody"):
        go(replace(small_table(), {"budget.development": ["nobody"]}), stub())
    with pytest.raises(ConfigError, match=r"finetune.classes: no label of gizzard may be read"):
        go(replace(small_table(), {"finetune.classes": ["gizzard"]}), stub())
    with pytest.raises(ConfigError, match=r"table.final is false, but budget.development names no scans"):
        go(small_table(final=False), stub())
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"views.size": [18, 16, 16]}, r"pretrain/.*: views\.size 18,16,16: every edge must be a multiple of 4"),
        ({"pretrain.batch_size": 4, "engine.accumulation_steps": 3}, r"pretrain/.*: pretrain\.batch_size 4"),
        ({"finetune.patch_size": [22, 24, 24]}, r"trial/.*: finetune\.patch_size 22,24,24"),
    ],
)
def test_what_an_item_would_refuse_is_refused_before_the_table_is_begun(
    go, small_table, stub, tmp_path, settings, said
):
    with pytest.raises(ConfigError, match=said):
        go(replace(small_table(), settings), stub())
    assert not (tmp_path / "table").exists()


def test_a_stage_that_the_shards_cannot_give_is_refused_before_the_table_is_begun(go, small_table, stub, tmp_path):
    stages = STAGES | {"mixcl": STAGES["mixcl"] | {"settings": {"views.size": [32, 32, 32]}}}
    with pytest.raises(ConfigError, match=r"pretrain/mixcl-n1-s0: views\.size .* larger than the shards' patches"):
        go(small_table(stages=stages), stub())
    assert not (tmp_path / "table").exists()


def test_a_stage_that_finds_no_batch_is_refused_before_the_table_is_begun(go, small_table, stub, tmp_path):
    stages = STAGES | {"identity": {"settings": {"data.labelled_fraction": 0.5}}}
    with pytest.raises(ConfigError, match=r"pretrain/identity: .* do not fill a batch of \d+: no labels may be read"):
        go(small_table(stages=stages), stub())
    assert not (tmp_path / "table").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", [(), (Path("benchmarks/few_label/cpu.yaml"),)], ids=["recipe", "cpu"])
def test_openkbp_gives_all_that_the_recipe_few_label_asks_for(ct, openkbp_shards, stub, tmp_path, config):
    """Its stages can be begun, the one on other organs too, for which all scans are labelled."""
    table = load(*config, recipe="few_label")
    ending = run_table(
        table, data=ct / "openkbp", shards=openkbp_shards, out=tmp_path / "table", command=stub(), seconds=0
    )
    assert ending.planned == 400 and not ending.done


def test_shards_that_hold_a_held_out_scan_under_another_name_are_refused_before(small_table, cohort, stub, tmp_path):
    """Every trial would refuse the pre-training, once it is done."""
    held_out = next(case for case in open_source(cohort[0]).cases if case.split == "validation")
    archive = tmp_path / "archive"
    archive.mkdir()
    shutil.copy(held_out.files[0], archive / "0.nii.gz")
    build([cohort[0], archive], tmp_path / "shards", BuildConfig(patch_size=(24, 24, 24)), run=in_this_process)
    with pytest.raises(RunError, match=rf"shards: ct-\w+ is validation case {held_out.name} of .*--exclude"):
        run_table(small_table(), data=cohort[0], shards=tmp_path / "shards", out=tmp_path / "table", command=stub())
    assert not (tmp_path / "table" / "plan.json").exists() and not (tmp_path / "order").exists()


@pytest.mark.slow
def test_a_killed_table_leaves_no_process_and_goes_on(go, small_table, stub, cohort, shards, tmp_path):
    """SIGKILL in the middle of the second item: the first is not run again, the second is."""
    body = """
    if (out / "slow").exists() and name == "probe/random":
        (out / "pid").write_text(str(os.getpid()))
        time.sleep(60)
    """
    command = stub(body)
    out = tmp_path / "table"
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import pathlib, sys, json\n"
        "from mixcl_dist.config import load\n"
        "from mixcl_dist.studies.table.runner import run_table\n"
        f"command = lambda out, name: {command('OUT', 'NAME')[:3]!r} + [str(out), name]\n"
        f"out = pathlib.Path({str(out)!r})\n"
        f"run_table(load(out / 'config.yaml'), data=pathlib.Path({str(cohort[0])!r}), "
        f"shards=pathlib.Path({str(shards)!r}), out=out, command=command)\n"
    )
    go(small_table(), command, only="trial/scratch*")
    (out / "slow").touch()
    process = subprocess.Popen([sys.executable, driver])
    until(lambda: (out / "pid").exists() and (out / "pid").read_text())
    with pytest.raises(
        RunError, match=f"process {process.pid} of machine .* is working here; wait for it, or give another --out"
    ):
        go(small_table(), command)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pid = Path("/proc") / (out / "pid").read_text()
    until(lambda: not pid.exists() or "Z" in (pid / "stat").read_text().rpartition(")")[2].split()[0])
    with (out / "ledger.jsonl").open("a") as file:
        file.write('{"item": "torn')
    (out / "slow").unlink()
    assert go(small_table(), command).done == 2
    assert order(tmp_path).count("trial/scratch-n1-s0") == 1 and order(tmp_path).count("probe/random") == 2


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


REAL = {
    "scans": [1],
    "seeds": [0],
    "stages": {
        "reconstruction": {"settings": {"objective.voxel_identity": 0, "objective.crop_identity": 0}},
        "mixcl": {"start": "reconstruction", "labels": "budget"},
    },
    "arms": {"scratch": {}, "mixcl": {"stage": "mixcl"}},
    "baselines": ["random"],
    "margin": -1.0,
    "resamples": 100,
}


@pytest.fixture
def real(small_config, cohort):
    """A tiny table of the phantom cohort, with three training scans kept back to probe on."""
    kept_back = [case.name for case in open_source(cohort[0]).cases if case.split == "training"][-3:]
    changes = {"table": REAL, "pretrain.steps": 1, "finetune.steps": 1, "budget.development": kept_back}
    return replace(small_config, changes)


@pytest.mark.slow
def test_a_trial_is_run_as_a_process_and_reported(real, cohort, shards, tmp_path):
    out = tmp_path / "table"
    ending = run_table(real, data=cohort[0], shards=shards, out=out, only="trial/scratch*")
    assert (ending.done, ending.planned, ending.failed) == (1, 2, ()), (out / "logs").iterdir()
    scored = json.loads((out / "trial" / "scratch-n1-s0" / "dice.json").read_text())["cases"]
    assert set(scored) == {case.name for case in open_source(cohort[0]).cases if case.split == "validation"}
    write_report(out)
    assert json.loads((out / "table.json").read_text())["done"] == 1


def test_a_table_for_choosing_between_recipes_scores_development_scans(real, cohort, shards, tmp_path):
    out = tmp_path / "table"
    choosing = replace(real, {"table.final": False})
    run_table(choosing, data=cohort[0], shards=shards, out=out, only="trial/scratch*", seconds=0)
    work(out, "trial/scratch-n1-s0")
    dice = json.loads((out / "trial" / "scratch-n1-s0" / "dice.json").read_text())
    assert set(dice["cases"]) == set(real.budget.development) and dice["scored"] == "development"
    write_report(out)
    said = "Scored on development scans, for choosing between recipes"
    assert said in (out / "report" / "index.html").read_text() and said in table_text(out)
    run_table(real, data=cohort[0], shards=shards, out=tmp_path / "final", seconds=0)
    assert said not in table_text(tmp_path / "final")
    digests = [json.loads((o / "plan.json").read_text())["items"][0]["digest"] for o in (out, tmp_path / "final")]
    assert digests[0] != digests[1]


def test_every_kind_of_item_does_its_work(real, cohort, shards, tmp_path):
    """In this process, item by item; a pre-training that was cut off leaves no half in the way."""
    out = tmp_path / "table"
    run_table(real, data=cohort[0], shards=shards, out=out, seconds=0)
    (out / "pretrain" / "mixcl-n1-s0").mkdir(parents=True)
    (out / "pretrain" / "mixcl-n1-s0" / "run.json").write_text('{"kind": "pretrain"')
    for name in plan(real):
        work(out, name)
    facts = {name: json.loads((out / name / "run.json").read_text()) for name in plan(real) if "probe" not in name}
    trial, start = facts["trial/mixcl-n1-s0"], facts["pretrain/mixcl-n1-s0"]
    assert (
        load(out / "pretrain" / "mixcl-n1-s0" / "config.yaml").checkpoint.every == 1
    )  # of 1 step, so as to lose little
    assert trial["start"] == str(out / "pretrain" / "mixcl-n1-s0")
    assert start["start"] == str(out / "pretrain" / "reconstruction")
    assert trial["label_cases"] == start["label_cases"] == facts["trial/scratch-n1-s0"]["label_cases"]
    assert len(trial["label_cases"]) == 1 and not set(trial["label_cases"]) & set(real.budget.development)
    assert trial["spacing_mm"] == facts["trial/scratch-n1-s0"]["spacing_mm"]
    for probed in ("probe/random", "pretrain/mixcl-n1-s0"):
        assert "mean" in json.loads((out / probed / "probe.json").read_text())["linear"]
