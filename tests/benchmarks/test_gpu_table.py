"""The few-label table on a GPU that is lent for minutes: what is run first, and what is kept for the next loan."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
from pathlib import Path

import pytest

from mixcl_dist.cluster import checkpoint
from mixcl_dist.config import load
from mixcl_dist.studies.ledger import Ledger
from mixcl_dist.studies.table.plan import plan

BYTES = 20_000  #: of a network
DONE = ("pretrain/identity", "pretrain/mixcl-n1-s0", "probe/random", "trial/scratch-n1-s0")


@pytest.fixture
def folder(tmp_path):
    """A table in the middle: one label-free pre-training done, the other cut off, one trial done."""
    table = tmp_path / "work" / "few_label"
    ledger = Ledger(table / "ledger.jsonl")
    items = [dataclasses.asdict(item) | {"digest": "0"} for item in plan(load(recipe="few_label")).values()]
    (table / "plan.json").write_text(json.dumps({"items": items}))
    for name in DONE:
        ledger.add(name, "0", "done")
    ledger.add("pretrain/reconstruction", "0", "begun")
    write(table / "trial" / "scratch-n1-s0" / "dice.json", b"{}")
    write(table / "trial" / "scratch-n1-s0" / "model.safetensors", os.urandom(BYTES))
    for name in DONE[:2]:
        network = os.urandom(BYTES)
        write(table / name / "run.json", b"{}")
        write(table / name / "network.safetensors", network)
        write(table / name / "pretrain.safetensors", network + b"heads")
    for step in (1, 2):
        with checkpoint.publish(table / "pretrain/reconstruction/checkpoints", step, keep=2, state={}) as path:
            write(path / "engine" / "state.pt", os.urandom(3 * BYTES))
    return table


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_next_loan_goes_on_from_one_archive(benchmark, folder, tmp_path):
    table = benchmark("table")
    table.keep(folder, tmp_path / "kept.tar.xz")
    table.unpack(tmp_path / "kept.tar.xz", tmp_path / "next")
    before, after = files(folder), files(tmp_path / "next")
    assert after.items() <= before.items()
    assert {"ledger.jsonl", "plan.json", "trial/scratch-n1-s0/dice.json"} <= set(after)
    assert {
        f"pretrain/{run}/{kind}.safetensors" for run in ("identity", "mixcl-n1-s0") for kind in ("network", "pretrain")
    } <= set(after)
    assert checkpoint.newest(tmp_path / "next/pretrain/reconstruction/checkpoints").name == "step_00000002"
    assert not [name for name in after if "step_00000001" in name or "model.safetensors" in name]
    assert len(list(tmp_path.glob("kept*"))) == 1 and not list(tmp_path.glob(".*"))


def test_an_archive_keeps_its_size_and_what_most_is_left_to_start_from(benchmark, folder, tmp_path):
    table = benchmark("table")
    for most, networks in ((0, []), (2 * BYTES, ["identity"]), (3 * BYTES, ["identity", "mixcl-n1-s0"])):
        table.keep(folder, tmp_path / "kept.tar.xz", most)
        table.unpack(tmp_path / "kept.tar.xz", tmp_path / str(most))
        found = [path.parent.name for path in sorted((tmp_path / str(most)).rglob("network.safetensors"))]
        assert found == networks and (tmp_path / str(most) / "ledger.jsonl").exists()
        assert not most or (tmp_path / "kept.tar.xz").stat().st_size <= most


def test_the_pattern_of_what_is_run_first_is_of_all_label_free_pretrainings_and_of_no_other(benchmark):
    config = load(recipe="few_label")
    chosen = fnmatch.filter(plan(config), benchmark("table").RUN_ONCE)
    assert sorted(chosen) == ["pretrain/identity", "pretrain/reconstruction"]


@pytest.fixture
def measured(benchmark, tmp_path, monkeypatch):
    """Measures the item while the product's command does nothing but what `called` does; returns both."""
    table = benchmark("table")
    options = argparse.Namespace(work=tmp_path / "work", out=tmp_path / "out", seconds=330, tiny=False)
    options.out.mkdir()
    calls = []

    def measure(item="table/few_label", **changes):
        monkeypatch.setattr(table.cli, "main", lambda words: calls.append(words) or 0)
        monkeypatch.setattr(table, "table_text", lambda folder: "")
        monkeypatch.setattr(
            table,
            "write_report",
            lambda folder: (folder / "table.json").write_text('{"done": 1, "planned": 400, "headline": "No gain."}'),
        )
        return table.measure(item, argparse.Namespace(**vars(options) | changes)), calls

    return measure


def test_label_free_pretrainings_have_the_gpu_first_and_few_others_at_any_time(measured, folder):
    found, (first, then) = measured()
    assert first[first.index("--only") + 1] == "pretrain/*[a-z]" and first[first.index("--workers") + 1] == "3"
    assert "--only" not in then and then[then.index("--workers") + 1] == "16"
    assert then[then.index("--pretrainings") + 1] == "3"
    assert 0 < float(then[then.index("--seconds") + 1]) <= 330 - 30
    assert found["partial"] and found["passed"]
    _, calls = measured(seconds=35)
    assert len(calls) == 3  # no time for trials


def test_a_table_is_partial_until_every_trial_is_done_or_barred(measured, folder):
    ledger = Ledger(folder / "ledger.jsonl")
    trials = [
        item["name"] for item in json.loads((folder / "plan.json").read_text())["items"] if item["kind"] == "trial"
    ]
    for name in trials[:-2]:
        ledger.add(name, "0", "done", mean=None, text="nothing scored")
    ledger.add(trials[-2], "0", "barred")
    ledger.add(trials[-1], "of other sources", "done")
    assert measured()[0]["partial"]
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.add(trials[-1], "0", "barred")
    assert not measured()[0]["partial"]


def test_the_committed_table_of_the_same_card_is_gone_on_with(benchmark, tmp_path):
    queue, kept = benchmark("work_queue"), benchmark("stages").KEPT_TABLE
    out = tmp_path / "out"
    out.mkdir()
    for card in ("H100", "H200"):
        Ledger(tmp_path / card / "ledger.jsonl", card).add("x/a", "0", "done")
        (tmp_path / card / kept).write_text(card)
    earlier = sorted(tmp_path.glob("H*/ledger.jsonl"))
    queue.bring_table(earlier, "A100", out)
    assert not list(out.iterdir())
    queue.bring_table(earlier, "H200", out)
    assert (out / kept).read_text() == "H200"
    (out / kept).write_text("newer")
    queue.bring_table(earlier, "H200", out)
    assert (out / kept).read_text() == "newer"
