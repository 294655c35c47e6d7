"""Whoever goes through the door to Ray is told within seconds where there is none, and sends nothing anywhere."""

from __future__ import annotations

import os
import socket
import time

import pytest
import ray

from mixcl_dist.cluster import ray as door
from mixcl_dist.cluster.ray import ClusterError, check_resources, connection


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "no-such-host.invalid:6379"])
def test_without_a_cluster_there_it_says_so(address):
    told = rf"trials\.address {address}: .*; start Ray there, or leave trials\.address out"
    with pytest.raises(ClusterError, match=told), connection(address, option="trials.address"):
        pass
    assert not ray.is_initialized()


def test_a_silent_address_is_given_up(monkeypatch):
    monkeypatch.setattr(door, "ANSWER_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        port = silent.getsockname()[1]
        waiting = [socket.create_connection(("127.0.0.1", port))]  # the queue is full: more get no answer
        begin = time.monotonic()
        with pytest.raises(ClusterError, match="timed out"), connection(f"127.0.0.1:{port}", option="--ray"):
            pass
        assert time.monotonic() - begin < 10
        waiting[0].close()


def test_a_connection_is_ended_and_reports_no_usage():
    with connection("local", option="--ray", cpus=1, variables={"COLOUR": "blue"}):
        assert ray.get(ray.remote(lambda: os.environ["COLOUR"]).remote()) == "blue"
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        check_resources({"trials.cpus": ("CPU", 1)})
        with pytest.raises(ClusterError, match=r"trials\.gpus 1: Ray has 0; lower it"):
            check_resources({"trials.gpus": ("GPU", 1)})
    assert not ray.is_initialized()
