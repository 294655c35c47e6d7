"""Two hosts behind ssh, or with a Ray cluster over them, are one group and come to the weights of any two ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixcl_dist.records import METRICS, PretrainRecord

from .conftest import SETTINGS, digest_of_weights

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks" / "faults"))
from machines import ADDRESS, Machines, machines, missing

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
OPEN = os.environ | {"RAY_AUTH_MODE": "disabled"}  # to these hosts alone
HEAD = f"{ADDRESS.format(1)}:6379"


@pytest.fixture
def hosts() -> Iterator[Machines]:
    if reason := missing():
        pytest.skip(reason)
    with machines() as hosts:
        yield hosts


def launched(hosts: Machines, *command: str | Path) -> subprocess.Popen:
    launch = [sys.executable, "-m", "mixcl_dist", "launch", "hosts", "--hosts", "a,b", "--"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launch, *map(str, command)], env=hosts.environment, **pipes)


def test_the_doctor_looks_at_both(hosts, shards):
    page, errors = launched(hosts, "doctor", "--cluster", "--data", shards).communicate(timeout=200)
    found = {line[6:24].strip(): line for line in page.splitlines()}
    assert "2 ranks on 2 machines: a, b" in found["machines"], errors
    assert len(found) == len(page.splitlines()) == 11, "one page, from rank 0 alone"
    assert "a–b" in found["all-reduce"] and all(found[name].startswith("ok") for name in ("clocks", "versions"))


def test_a_launcher_that_is_told_to_stop_lets_its_hosts_save_and_go_on(hosts, shards, undisturbed, tmp_path):
    run = tmp_path / "run"
    job = launched(hosts, "pretrain", "--data", shards, "--run", run, *SETTINGS)
    end = time.monotonic() + 300
    while not (run / METRICS).exists():
        assert time.monotonic() < end and job.poll() is None
        time.sleep(0.2)
    job.terminate()
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 128 + signal.SIGTERM and "go on with --resume latest" in errors
    again = launched(hosts, "pretrain", "--data", shards, "--run", run, *SETTINGS)
    _, errors = again.communicate(timeout=400)
    assert again.returncode == 0, errors
    assert digest_of_weights(run) == undisturbed


def test_a_ray_cluster_of_two_hosts_pretrains(hosts, shards, undisturbed, tmp_path):
    start_ray(hosts)
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "mixcl_dist", "launch", "ray", "--address", HEAD, "--nodes", "2", "--"]
    pretrain = ["pretrain", "--data", shards, "--run", run, *SETTINGS]
    command = [*hosts.inside("a"), *launch, *pretrain]
    done = subprocess.run(command, env=OPEN, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert PretrainRecord.load(run).world_size == 2
    assert digest_of_weights(run) == undisturbed


def start_ray(hosts: Machines) -> None:
    """A core on each host, so that neither can hold both ranks."""
    ray = [Path(sys.executable).with_name("ray"), "start", "--num-cpus=1", "--object-store-memory=100000000"]
    ray += ["--disable-usage-stats"]
    where = {
        "a": ["--head", f"--node-ip-address={ADDRESS.format(1)}", "--port=6379", "--include-dashboard=false",
              f"--temp-dir={hosts.folder}/ray"],
        "b": [f"--address={HEAD}", f"--node-ip-address={ADDRESS.format(2)}"],
    }  # fmt: skip
    for name, words in where.items():
        command = [*hosts.inside(name), *map(str, ray), *words]
        done = subprocess.run(command, env=OPEN, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
