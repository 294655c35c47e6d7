"""A Ray cluster of two hosts pre-trains as one group, and comes to the weights that two ranks come to anywhere."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixcl_dist.records import PretrainRecord

from .conftest import SETTINGS, digest_of_weights

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks" / "faults"))
from machines import ADDRESS, Machines, machines, missing

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
HEAD = f"{ADDRESS.format(1)}:6379"


@pytest.fixture
def hosts() -> Iterator[Machines]:
    if reason := missing():
        pytest.skip(reason)
    with machines() as hosts:
        yield hosts


def test_a_ray_cluster_of_two_hosts_pretrains(hosts, shards, undisturbed, tmp_path):
    start_ray(hosts)
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "mixcl_dist", "launch", "ray", "--address", HEAD, "--nodes", "2", "--"]
    pretrain = ["pretrain", "--data", shards, "--run", run, *SETTINGS]
    done = subprocess.run([*hosts.inside("a"), *launch, *pretrain], capture_output=True, text=True, timeout=600)
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
        begin = time.monotonic()
        done = subprocess.run(
            [*hosts.inside(name), *map(str, ray), *words], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr} after {time.monotonic() - begin:.0f} s"
