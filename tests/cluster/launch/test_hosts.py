"""A command on several hosts is one command: it ends where one of them fails, and stops them all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixcl_dist.cluster.launch import hosts
from mixcl_dist.cluster.launch.job import Job, LaunchError

JOB = Job(("pretrain", "--data", "shards", "--run", "runs/a"), nodes=2, threads=3)


def test_every_host_is_told_where_to_meet_and_which_it_is(tmp_path, monkeypatch):
    """With a remote shell that runs things here, and a python that says what it was given."""
    monkeypatch.chdir(tmp_path)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PWD $OMP_NUM_THREADS $@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    shell = ("sh", "-c", 'eval "$1"')  # "$0" is the host
    said = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for command in hosts.commands(JOB, ["a", "b"], shell=shell, port=1234)
    ]
    for rank, line in enumerate(said):
        meeting = f"--nproc-per-node=1 --nnodes=2 --master-addr=a --master-port=1234 --node-rank={rank}"
        command = f"--no-python -- {python} -m mixcl_dist pretrain --data shards --run runs/a"
        assert line == f"{tmp_path} 3 -m torch.distributed.run {meeting} {command}\n"


@pytest.mark.parametrize("text", ["a,b", "file"])
def test_hosts_are_named_or_listed(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a  # the first\n\n b\n")
    assert hosts.read_hosts(text) == ["a", "b"]


@pytest.mark.parametrize("text", ["", " , ", "empty"])
def test_no_host_at_all_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("# none\n")
    with pytest.raises(LaunchError, match="names no host"):
        hosts.read_hosts(text)
    with pytest.raises(LaunchError, match="named twice"):
        hosts.commands(JOB, ["a", "a"])


def test_the_first_failure_ends_the_others(monkeypatch):
    monkeypatch.setattr(hosts, "GRACE_S", 0.5)
    monkeypatch.setattr(hosts, "LOOK_EVERY_S", 0.05)
    begin = time.monotonic()
    assert hosts.run([["sleep", "60"], ["sh", "-c", "sleep 0.2; exit 7"]], {}) == 7
    assert time.monotonic() - begin < 10
    assert hosts.run([["true"], ["sh", "-c", "test $COLOUR = blue"]], {"COLOUR": "blue"}) == 0


def test_told_to_stop_it_stops_them_all(tmp_path):
    child = f"trap 'echo stopped >> {tmp_path}/said; exit 0' TERM; touch {tmp_path}/$0; while true; do sleep 0.1; done"
    program = f"""
import sys
from mixcl_dist.cluster.launch import hosts
sys.exit(hosts.run([["sh", "-c", {child!r}, "a"], ["sh", "-c", {child!r}, "b"]], {{}}))
"""
    launcher = subprocess.Popen([sys.executable, "-c", program], env=os.environ)
    while not ((tmp_path / "a").exists() and (tmp_path / "b").exists()):
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=30) == 128 + signal.SIGTERM
    assert (tmp_path / "said").read_text() == "stopped\n" * 2
