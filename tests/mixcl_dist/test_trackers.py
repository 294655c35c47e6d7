"""What trackers are told: every step that counts, once, and nothing that names a person, a folder or a machine."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import urllib.request

import pytest

from mixcl_dist.config import Config, ConfigError, replace
from mixcl_dist.records import PretrainRecord, RunRecord, read_metrics
from mixcl_dist.run import Run
from mixcl_dist.trackers import check_trackers, told_settings

from ..ports import free_port

PATIENT = "Zimmerova-Ludmila"
NAMED = {
    "budget.development": [PATIENT], "budget.classes": [PATIENT], "budget.full_datasets": [PATIENT],
    "budget.distinct_patients": [[PATIENT, PATIENT]], "data.upsampling": {PATIENT: 2},
    "data.cache": {"folder": f"/{PATIENT}", "max_bytes": 10**9},
}  # fmt: skip
"""All settings of a pre-training that hold what somebody else named."""


def test_settings_are_told_but_for_names():
    config = replace(Config(), NAMED | {"views.scale": [0.8, 1.2]})
    told = told_settings(config)
    assert told["optimizer.learning_rate"] == 1e-3 and told["views.scale"] == (0.8, 1.2)
    assert told["network.architecture"] == "dynunet" and told["data.class_aware"] is True
    assert PATIENT not in str(told) and not told.keys() & NAMED.keys()


def test_what_is_not_installed_or_has_no_address_is_refused(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("mixcl_dist.trackers.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"^pretrain.trackers wandb: is not installed; pip install 'mixcl-dist\[wandb"
    ):
        check_trackers(("wandb",))
    monkeypatch.setattr("mixcl_dist.trackers.find_spec", lambda name: "there")
    with pytest.raises(ConfigError, match=r"^pretrain.trackers mlflow: set MLFLOW_TRACKING_URI"):
        check_trackers(("mlflow",))


def run_of(folder, *names):
    config = replace(Config(), NAMED | {"pretrain.trackers": list(names)})
    return Run.create(folder, config, PretrainRecord(name=folder.name, finished=None, label_cases=(PATIENT,)))


def interrupted(folder, *names) -> None:
    """Five steps, of which a resumed run forgets two and takes three others."""
    first = run_of(folder, *names)
    for step in range(1, 6):
        first.log(step, loss=float(step))
    again = run_of(folder, *names)
    again.forget_metrics_after(3)
    for step in range(4, 7):
        again.log(step, loss=100.0 + step)
    again.finish()


KEPT = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 104.0), (5, 105.0), (6, 106.0)]


def address_of_server(folder, request) -> str:
    """Of an MLflow server of its own."""
    pytest.importorskip("sqlalchemy", reason="MLflow's server is not installed; pip install mlflow")
    port = free_port()
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder)]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--port", str(port), "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    request.addfinalizer(lambda: os.killpg(server.pid, 9))
    wait = f"http://127.0.0.1:{port}/health"
    while True:
        assert server.poll() is None
        try:
            urllib.request.urlopen(wait).close()
        except OSError:
            time.sleep(0.2)
        else:
            return f"http://127.0.0.1:{port}"


@pytest.fixture(params=["folder", "server"])
def mlflow(request, tmp_path, monkeypatch):
    """A client of a store in a folder, and of a server."""
    module = pytest.importorskip("mlflow", reason="mlflow is not installed; pip install 'mixcl-dist[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    address = f"file://{tmp_path}/store" if request.param == "folder" else address_of_server(tmp_path, request)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return module.MlflowClient(address)


@pytest.mark.slow
def test_mlflow_shows_no_step_that_a_resume_forgot(mlflow, tmp_path):
    folder = tmp_path / PATIENT
    interrupted(folder, "mlflow")
    (shown,) = mlflow.search_runs([mlflow.get_experiment_by_name("mixcl").experiment_id])
    assert RunRecord.load(folder).trackers == {"mlflow": shown.info.run_id}
    history = mlflow.get_metric_history(shown.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == KEPT
    assert shown.data.params["optimizer.learning_rate"] == "0.001" and shown.info.status == "FINISHED"
    assert not {"mlflow.user", "mlflow.source.name", "mlflow.source.git.commit"} & shown.data.tags.keys()
    assert PATIENT not in str(shown.data.to_dictionary()) + shown.info.run_name


@pytest.mark.slow
def test_a_run_that_forgets_nothing_goes_on_in_mlflow(mlflow, tmp_path):
    for first in (1, 3):
        run = run_of(tmp_path / "run", "mlflow")
        run.forget_metrics_after(first - 1)
        for step in (first, first + 1):
            run.log(step, loss=float(step))
    (shown,) = mlflow.search_runs([mlflow.get_experiment_by_name("mixcl").experiment_id])
    history = mlflow.get_metric_history(shown.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(n, float(n)) for n in range(1, 5)]


@pytest.mark.slow
def test_wandb_shows_no_step_that_a_resume_forgot_and_no_name(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed; pip install 'mixcl-dist[wandb]'")
    monkeypatch.setattr(sys, "argv", ["mixcl", "pretrain", "--budget.development", PATIENT])
    folder = tmp_path / PATIENT
    interrupted(folder, "wandb")
    (kept,) = folder.glob("wandb/offline-run-*")
    assert kept.name.endswith(RunRecord.load(folder).trackers["wandb"])
    (file,) = kept.glob("*.wandb")
    records = records_of_wandb(file)
    assert [row(record.history) for record in records if record.WhichOneof("record_type") == "history"] == KEPT
    (begun,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert "optimizer.learning_rate" in {item.key for item in begun.config.update}
    assert begun.host == "" and not begun.HasField("git")
    assert not {"environment", "output", "output_raw", "stats"} & {r.WhichOneof("record_type") for r in records}
    assert PATIENT.encode() not in file.read_bytes()


def row(history) -> tuple[int, float]:
    items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in history.item}
    return items["_step"], items["loss"]


def records_of_wandb(file) -> list:
    from wandb.proto import wandb_internal_pb2

    return [wandb_internal_pb2.Record.FromString(content) for content in records_of_leveldb(file.read_bytes())]


def records_of_leveldb(log: bytes):
    """Each behind seven bytes, in parts that end with a block of 32 KiB; the log begins with seven bytes of W&B's."""
    place, record = 7, b""
    while place + 7 <= len(log):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", log, place + 4)
        record += log[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


class Broken:
    id = "1"

    def log(self, entries) -> None:
        raise ConnectionError("no route\nto host")

    def close(self) -> None:
        raise AssertionError("it is told nothing more")


def test_a_tracker_that_fails_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mixcl_dist.run.begin_tracker", lambda *_: Broken())
    run = run_of(tmp_path / "run", "mlflow")
    for step in (1, 2):
        run.log(step, loss=1.0)
    run.finish()
    assert [entry["step"] for entry in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("pretrain: mlflow is told nothing more (no route to host); metrics")
    assert RunRecord.load(tmp_path / "run").trackers == {}
