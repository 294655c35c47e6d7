"""A command on several hosts is one: it stops them all, and goes on without a host that is lost until it is back."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mixcl_dist.cluster.launch import hosts
from mixcl_dist.cluster.launch.job import Job, LaunchError

SHELL = ("sh", "-c", 'eval "$1"')  # "$0" is the host
JOB = Job(("pretrain", "--data", "shards", "--run", "runs/a"), nodes=2, threads=3)


def test_every_host_is_told_where_to_meet_and_which_it_is(tmp_path, monkeypatch):
    """With a remote shell that runs things here, and a python that says what it was given."""
    monkeypatch.chdir(tmp_path)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PWD $OMP_NUM_THREADS $@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    said = []
    for command in hosts.commands(JOB, ["a", "b"], shell=SHELL, port=1234):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            said.append(process.stdout.read())
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


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Starts the launcher, with a shell that runs things here; a host is there as long as a file of its name is."""

    def launched(child: str, names=("a", "b"), failures=0) -> subprocess.Popen:
        (tmp_path / "python").write_text(f"#!/bin/sh\ncd {tmp_path}\nhost=$MIXCL_HOST\n{child}\n")
        (tmp_path / "python").chmod(0o755)
        shell = ("sh", "-c", f'cd {tmp_path}; test -e "$0" || exit 255; export MIXCL_HOST=$0; eval "$1"')
        program = f"""
import sys
from mixcl_dist.cluster.launch import hosts
from mixcl_dist.cluster.launch.job import Job
sys.executable = {str(tmp_path / "python")!r}
hosts.LOOK_EVERY_S, hosts.LOOK_FOR_LOST_EVERY_S, hosts.GRACE_S = 0.05, 0.2, 60
job = Job(("pretrain", "--data", "shards", "--run", "runs/a"), id="colour-blue")
sys.exit(hosts.run(job, {list(names)!r}, shell={shell!r}, failures={failures}))
"""
        for name in names:
            (tmp_path / name).touch()
        return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)

    return launched


def wait_for(*files: Path) -> None:
    end = time.monotonic() + 30
    while not all(file.exists() for file in files):
        assert time.monotonic() < end, files
        time.sleep(0.02)


WAITS = "sleep 60 & trap 'echo $host >> stopped; kill $!; exit 1' TERM; touch began-$host\nwait $!"


@pytest.mark.cluster
def test_all_end_well_and_know_their_job(launched, tmp_path):
    assert launched("echo $MIXCL_JOB >> said").wait(30) == 0
    assert (tmp_path / "said").read_text() == "colour-blue\n" * 2


@pytest.mark.cluster
def test_the_first_failure_ends_the_others(launched, tmp_path):
    job = launched(f"[ $host = a ] && {{ until [ -e began-b ]; do sleep 0.05; done; exit 7; }}\n{WAITS}", failures=3)
    assert job.wait(30) == 7 and job.stderr.read() == ""
    assert (tmp_path / "stopped").read_text() == "b\n"


@pytest.mark.cluster
def test_told_to_stop_it_stops_them_all(launched, tmp_path):
    job = launched(WAITS)
    wait_for(tmp_path / "began-a", tmp_path / "began-b")
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 128 + signal.SIGTERM
    assert sorted((tmp_path / "stopped").read_text().split()) == ["a", "b"]


@pytest.mark.cluster
def test_on_this_machine_it_stops_what_it_started(launched, tmp_path):
    job = launched(f"host=here\n{WAITS}", names=())
    wait_for(tmp_path / "began-here")
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 128 + signal.SIGTERM
    assert (tmp_path / "stopped").read_text() == "here\n"


TURNS = f"""
echo "$host $*" >> turns; touch turn-$host
if [ $(grep -c "" turns) -lt 3 ]; then
    [ $host = b ] && {{ trap "" TERM; sleep 987; }}
    until [ -e lost ]; do sleep 0.05; done
    exit 5
fi
case "$*" in *--nnodes=1*) {WAITS.replace(chr(10), "; ")};; esac
"""


def lose_a(folder: Path) -> None:
    """Once both hosts are at work."""
    wait_for(folder / "turn-a", folder / "turn-b")
    (folder / "a").unlink()
    (folder / "lost").touch()


@pytest.mark.cluster
def test_it_goes_on_without_a_lost_host_and_with_it_once_it_is_back(launched, tmp_path):
    job = launched(TURNS, failures=1)
    lose_a(tmp_path)
    wait_for(tmp_path / "began-b")
    (tmp_path / "a").touch()
    assert job.wait(60) == 0
    said = [line for line in job.stderr.read().splitlines() if line.startswith("mixcl")]
    assert said == [
        "mixcl launch: a does not answer; goes on with b",
        "mixcl launch: all hosts answer; goes on with a, b",
    ]
    turns = [line.split() for line in (tmp_path / "turns").read_text().splitlines()]
    sizes = [next(word for word in words if word.startswith("--nnodes")) for words in turns]
    assert sizes == ["--nnodes=2"] * 2 + ["--nnodes=1"] + ["--nnodes=2"] * 2
    assert turns[2][0] == "b" and "--master-addr=b" in turns[2] and "--node-rank=0" in turns[2]
    assert (tmp_path / "stopped").read_text() == "b\n", "it was told to save before all went on"
    left = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == ["sleep", "987"]]
    assert not left, "what waited for the lost host was killed"


@pytest.mark.cluster
def test_a_lost_host_ends_a_job_that_may_not_go_on(launched, tmp_path):
    job = launched(TURNS, failures=0)
    lose_a(tmp_path)
    assert job.wait(30) == 5 and "goes on" not in job.stderr.read()
