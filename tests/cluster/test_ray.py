"""Whoever goes through the door to Ray is told within seconds where there is none, and sends nothing anywhere."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import ray

from mixcl_dist.cluster import ray as door
from mixcl_dist.cluster.ray import RayError, check_resources, check_shared, connection


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "no-such-host.invalid:6379"])
def test_without_a_cluster_there_it_says_so(address):
    told = rf"trials\.address {address}: .*; start Ray there, or leave trials\.address out"
    with pytest.raises(RayError, match=told), connection(address, option="trials.address"):
        pass
    assert not ray.is_initialized()


def test_where_no_ray_runs_here_it_says_what_starts_one(monkeypatch):
    def nobody(**options):
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify the one to connect to")

    monkeypatch.setattr(ray, "init", nobody)
    told = "--address auto: Could not find any .*; start Ray here by ray start --head$"
    with pytest.raises(RayError, match=told), connection("auto", option="--address"):
        pass


def test_a_silent_address_is_given_up(monkeypatch):
    monkeypatch.setattr(door, "ANSWER_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        port = silent.getsockname()[1]
        waiting = [socket.create_connection(("127.0.0.1", port))]  # the queue is full: more get no answer
        with pytest.raises(RayError, match="timed out"), connection(f"127.0.0.1:{port}", option="--ray"):
            pass
        waiting[0].close()


def test_what_no_one_machine_has_is_refused_though_the_cluster_has_it(monkeypatch):
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "memory": 8e9}},
        {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 64.0}}])
    check_resources({"CPUs": ("CPU", 6)})
    check_resources({"trials.cpus": ("CPU", 4), "trials.memory_gb": ("memory", 8)}, on_one_machine=True)
    for wanted, said in [
        ({"trials.cpus": ("CPU", 6)}, "trials.cpus 6: the largest of 2 machines has 4"),
        ({"trials.memory_gb": ("memory", 9)}, "trials.memory_gb 9: the largest of 2 machines has 8"),
        ({"trials.gpus": ("GPU", 1), "trials.cpus": ("CPU", 4)}, "trials.gpus, trials.cpus: no one machine has them"),
    ]:
        with pytest.raises(RayError, match=said):
            check_resources(wanted, on_one_machine=True)


@pytest.mark.slow
def test_a_machine_with_other_code_is_refused_and_so_is_one_that_sees_other_files(tmp_path, monkeypatch):
    with connection("local", option="--ray", cpus=1):
        check_shared(tmp_path, [tmp_path])
        with pytest.raises(RayError, match=r"/nowhere: is not the same on machine .*; give paths on a file system"):
            check_shared(tmp_path, [Path("/nowhere")])
        monkeypatch.setattr(door, "code_digest", lambda: "of this machine")
        with pytest.raises(RayError, match=r"machine .*: has other code of this package; install the same version"):
            check_shared(tmp_path, [])


def test_a_connection_is_ended_and_reports_no_usage():
    with connection("local", option="--ray", cpus=1, variables={"COLOUR": "blue"}):
        assert ray.get(ray.remote(lambda: os.environ["COLOUR"]).remote()) == "blue"
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        check_resources({"trials.cpus": ("CPU", 1)})
        with pytest.raises(RayError, match=r"trials\.gpus 1: Ray has 0; lower it"):
            check_resources({"trials.gpus": ("GPU", 1)})
    assert not ray.is_initialized()
