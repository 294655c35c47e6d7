"""Trials under a real Ray on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from mixcl_dist.cluster import trials as trials_module
from mixcl_dist.cluster.ray import RayError
from mixcl_dist.cluster.trials import (
    EarlyStopping,
    Outcome,
    SearchError,
    TrialsConfig,
    _limit_memory,
    draw,
    run_trials,
)

pytestmark = pytest.mark.filterwarnings("error::DeprecationWarning:ray.*")


def test_each_trial_is_told_and_a_failure_does_not_touch_the_others(tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()

    def function(trial, report):  # nested, so that it travels by value
        (calls / f"{trial['id']}-{os.getpid()}-{time.monotonic_ns()}").touch()
        if trial["x"] < 0:
            raise ValueError("no root of a negative number")
        seen = {"threads": os.environ["OMP_NUM_THREADS"], "gpus": os.environ["CUDA_VISIBLE_DEVICES"]}
        return seen | {"root": trial["x"] ** 0.5, "pid": os.getpid()}

    outcomes: dict[str, Outcome] = {}
    trials = [{"id": "four", "x": 4}, {"id": "bad", "x": -1}, {"id": "nine", "x": 9}]
    run_trials(
        function,
        trials,
        storage=tmp_path / "tune",
        config=TrialsConfig(max_failures=1),
        ended=lambda outcome: outcomes.update({outcome.trial["id"]: outcome}),
    )
    assert outcomes["four"].result["root"] == 2 and outcomes["nine"].result["root"] == 3
    assert outcomes["nine"].result["gpus"] == "", "none was asked for, so none is seen"
    assert outcomes["nine"].result["threads"] == "1" and outcomes["nine"].result["pid"] != os.getpid()
    assert outcomes["bad"].error == "ValueError: no root of a negative number"
    assert "no root" in (tmp_path / "tune" / "failed" / "bad.txt").read_text() and outcomes["bad"].log.exists()
    called = [path.name.split("-")[0] for path in calls.iterdir()]
    assert sorted(called) == ["bad", "bad", "four", "nine"]  # the failed one was tried once more


def none(trial, report):
    return {}


def test_a_trial_that_no_machine_can_run_is_refused(tmp_path):
    with pytest.raises(RayError, match=r"trials\.cpus 100000: Ray has \d+"):
        run_trials(
            lambda trial, report: {}, [{"id": "a"}], storage=tmp_path, config=TrialsConfig(cpus=100_000), ended=print
        )


DRIVER = """
import sys, time
from pathlib import Path
from mixcl_dist.cluster.trials import TrialsConfig, run_trials

folder = Path(sys.argv[1])

def function(trial, report):
    with (folder / (trial["id"] + ".begun")).open("a") as file:
        file.write("begun\\n")
    while trial["id"] == "slow" and not (folder / "go").exists():
        time.sleep(0.1)
    (folder / (trial["id"] + ".done")).touch()
    return {}

trials = [{"id": name} for name in ("quick", "slow") if not (folder / (name + ".done")).exists()]
ended = lambda outcome: print("ended", outcome.trial["id"], flush=True)
run_trials(function, trials, storage=folder / "tune", config=TrialsConfig(), ended=ended)
"""


@pytest.mark.slow
def test_a_trial_that_asks_for_more_memory_than_its_share_fails_alone(tmp_path):
    def function(trial, report):
        return {"bytes": len(bytearray(trial["bytes"]))}

    outcomes = {}
    run_trials(
        function,
        [{"id": "large", "bytes": 4 * 10**9}, {"id": "small", "bytes": 10**7}],
        storage=tmp_path / "tune",
        config=TrialsConfig(memory_gb=3, max_failures=0, concurrent=1),
        ended=lambda outcome: outcomes.update({outcome.trial["id"]: outcome}),
    )
    assert outcomes["small"].result == {"bytes": 10**7} and "MemoryError" in outcomes["large"].error


@pytest.mark.parametrize(("gpus", "capped"), [(0.25, [0.25]), (1, []), (0, []), ("measured", [])])
def test_trials_that_share_a_gpu_have_no_more_than_their_share_of_its_memory(monkeypatch, gpus, capped):
    set_to = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_to.append)
    _limit_memory(TrialsConfig(gpus=gpus))
    assert set_to == capped


@pytest.mark.parametrize("gpus", [-1, 1.5, "measure", 1e9, float("nan"), None])
def test_gpus_that_no_trial_can_have_are_refused(gpus):
    with pytest.raises(ValueError, match="give 0, a share up to 1, a whole number, or measured"):
        TrialsConfig(gpus=gpus)


def test_a_trial_that_has_come_to_its_end_is_not_stopped_there():
    rule = EarlyStopping("asha", "dice", longest=9, grace=1, reduction=3).scheduler()
    for number in range(5):
        rule.on_trial_add(None, trial := SimpleNamespace(trial_id=str(number)))
        told = [rule.on_trial_result(None, trial, {"step": step, "dice": -number}) for step in (1, 3, 9)]
        assert told == (["CONTINUE"] * 3 if number == 0 else ["STOP", "STOP", "CONTINUE"])


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [500, 1])
def test_a_trial_that_falls_behind_is_stopped_also_by_those_that_ended_before(tmp_path, monkeypatch, at_once):
    """In one experiment of Tune, and in an experiment for each."""
    monkeypatch.setattr(trials_module, "AT_ONCE", at_once)

    def function(trial, report):
        for step in (1, 2, 3):
            report({"step": step, "dice": trial["dice"]})
        return {"steps": 3}

    heard, outcomes = [], {}
    run_trials(
        function,
        [
            {"id": "bad", "dice": 0.1},
            {"id": "good", "dice": 0.9},
            {"id": "passed", "dice": 0.1, "reported": [PASSED]},
            {"id": "fair", "dice": 0.8},
            {"id": "late", "dice": 0.5},
        ],
        storage=tmp_path / "tune",
        config=TrialsConfig(concurrent=1),
        ended=lambda outcome: outcomes.update({outcome.trial["id"]: outcome.result}),
        reported=lambda trial, figures: heard.append((trial["id"], figures["step"])),
        early=EarlyStopping("asha", "dice", longest=3, grace=1, reduction=3),
        earlier=[[{"step": 1, "dice": 0.2}]],
    )
    assert outcomes["bad"] is None and outcomes["good"] == {"steps": 3}
    assert outcomes["late"] is None, "which the earlier trial alone would have let through"
    assert heard[:4] == [("bad", 1), ("good", 1), ("good", 2), ("good", 3)]
    assert heard[4] == ("passed", 2), "what it had reported is neither told nor judged again"


PASSED = {"step": 1, "dice": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["asha", "median"])
def test_where_no_trial_reports_what_they_are_stopped_by_the_search_ends(tmp_path, method):
    with pytest.raises(SearchError, match=r"trials report no dice, so none can be stopped by it; .*"):
        run_trials(
            none,
            ({"id": str(number)} for number in range(1000)),
            storage=tmp_path / "tune",
            config=TrialsConfig(),
            ended=lambda outcome: None,
            early=EarlyStopping(method, "dice", longest=3, grace=1),
        )


@pytest.mark.slow
def test_a_killed_table_goes_on_and_keeps_what_it_had(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(tmp_path)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "ended quick\n"
    wait_for(tmp_path / "slow.begun")
    started = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    end(started)
    before = {path for path in (tmp_path / "tune").rglob("*") if path.is_file()}
    (tmp_path / "go").touch()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert again.stdout.splitlines() == ["ended slow"]
    assert (tmp_path / "quick.begun").read_text() == "begun\n"
    assert (tmp_path / "slow.begun").read_text() == "begun\nbegun\n"
    assert all(path.exists() for path in before)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_a_driver_ends_it_leaves_no_process_and_no_shared_memory(tmp_path, how):
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(tmp_path)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "slow.begun")
    started = psutil.Process(driver.pid).children(recursive=True)
    shared = {file for process in started for file in shared_memory_of(process)}
    driver.send_signal(how)
    driver.wait(timeout=300)
    _, alive = psutil.wait_procs(started, timeout=180)
    left = {name for process in alive if (name := name_of(process))}
    end(alive)
    if how is signal.SIGKILL:  # Ray's agents, which hold nothing, notice it minutes later
        left -= {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
    assert len(started) > 4 and not left
    assert not [file for file in shared if os.path.exists(file)]


def name_of(process):
    """None of one that has ended meanwhile."""
    try:
        return next(iter(process.cmdline()), None)
    except psutil.NoSuchProcess:
        return None


def shared_memory_of(process):
    try:
        return [mapping.path for mapping in process.memory_maps() if mapping.path.startswith("/dev/shm/")]
    except psutil.Error:
        return []


def wait_for(path, seconds=300):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.1)


def end(processes):
    """Kill what a killed driver left behind, as a machine that goes down would."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=30)


def test_without_a_search_there_is_one_point():
    assert draw({}, samples=3, seed=0) == [{}]


def test_a_search_draws_from_its_ranges_for_each_point_of_its_grids():
    search = {
        "a.rate": {"loguniform": [1e-4, 1e-2]},
        "a.size": {"grid": [1, 2]},
        "a.kind": {"choice": ["x", "y"]},
    }
    points = draw(search, samples=3, seed=0)
    assert [point["a.size"] for point in points] == [1, 2] * 3
    assert all(1e-4 <= point["a.rate"] <= 1e-2 and point["a.kind"] in "xy" for point in points)
    assert len({point["a.rate"] for point in points}) == 6
    assert points == draw(search, samples=3, seed=0) != draw(search, samples=3, seed=1)


@pytest.mark.parametrize("description", [{"normal": [0, 1]}, {"uniform": [1]}, {"choice": []}, {}])
def test_an_unknown_search_is_refused(description):
    with pytest.raises(SearchError, match=r"search for a\.rate: .* is not one of \{uniform: \[low, high\]\}"):
        draw({"a.rate": description}, samples=1, seed=0)


def test_the_configuration_can_be_had_without_ray():
    code = "import sys, mixcl_dist.cluster.trials; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
