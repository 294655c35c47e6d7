"""What is wrong between machines is found, named and comes with its cure; two ranks stand for two machines."""

from __future__ import annotations

import itertools
import json

import pytest

from mixcl_dist.cluster.machines import ladder, rounds_of_pairs

from . import ranks

PROGRAM = """
import dataclasses, json, os, sys, time
rank = os.environ["RANK"]
os.environ["SLURMD_NODENAME"] = f"n{rank}"
from mixcl_dist.cluster import group, machines

rate = 1e8
if sys.argv[1] == "ill" and rank == "1":
    ours, now = machines.version_of, time.time
    machines.version_of = lambda name: "0.0" if name == "torch" else ours(name)
    time.time = lambda: now() + 30
    os.makedirs(os.path.join(sys.argv[2], "other"))
    os.chdir(os.path.join(sys.argv[2], "other"))
    machines.shutil.disk_usage = lambda folder: type("Usage", (), {"free": 2**20})
    rate = 1e6
findings = machines.examine_machines(lambda part, parts: rate * (1 if rank == "1" else 3), timeout_s=60)
print(json.dumps({finding.name: [finding.fit, finding.detail] for finding in findings}))
group.leave(0)
"""


def examined(tmp_path, state):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    ended = ranks.finish(ranks.start([program, state, tmp_path], 2))
    assert [code for code, _, _ in ended] == [0, 0], ended
    one, other = [json.loads(output) for _, output, _ in ended]
    assert one == other, "all ranks know what is found"
    return one


@pytest.mark.slow
def test_two_machines_that_are_alike_are_fit_but_for_a_slow_reader(tmp_path):
    findings = examined(tmp_path, "well")
    assert {name for name, (fit, _) in findings.items() if not fit} <= {"shards"}
    assert findings["machines"][1] == "2 ranks on 2 machines: n0, n1"
    assert "torch" in findings["versions"][1] and "n0–n1" in findings["all-reduce"][1]
    assert "n1 is 0.0" in findings["clocks"][1]
    assert findings["time-outs"][1].startswith("store 60 s ≤ watchdog 60 s ≤ collective ")


@pytest.mark.slow
def test_what_is_wrong_is_named_with_its_machine_and_its_cure(tmp_path):
    findings = examined(tmp_path, "ill")
    told = {name: detail for name, (fit, detail) in findings.items() if not fit}
    assert "torch" in told["versions"] and "0.0 on n1: install the same" in told["versions"]
    assert told["clocks"].startswith("n1 is 30.0") and "ahead of" in told["clocks"] and "chronyd" in told["clocks"]
    assert "of n1, the least; 0.25 are needed" in told["/dev/shm"] and "of n1" in told["disk"]
    assert told["shared folder"].startswith("n1 does not see")
    assert "slowest n1 1.0 MB/s" in told["shards"]
    assert {"machines", "devices", "latency", "time-outs"}.isdisjoint(told)


@pytest.mark.parametrize("count", range(2, 10))
def test_every_pair_of_machines_is_measured_once_and_none_in_two_at_a_time(count):
    rounds = rounds_of_pairs(range(count))
    for pairs in rounds:
        members = [member for pair in pairs for member in pair]
        assert len(set(members)) == len(members)
    assert sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs) == list(
        itertools.combinations(range(count), 2)
    )
    assert len(rounds) == count - 1 + count % 2, "no more rounds than are needed"


@pytest.mark.parametrize(
    ("seconds", "fit", "told"),
    [
        (
            {"store": 600, "collective": 600, "watchdog": None, "scheduler": None},
            True,
            "store 600 s ≤ collective 600 s",
        ),
        ({"store": 10, "collective": 60, "watchdog": 90, "scheduler": 3600}, True, "store 10 s ≤ collective 60 s ≤"),
        ({"store": 90, "collective": 60}, False, "store waits 90 s, collective only 60 s; raise --engine.timeout_s"),
        ({"collective": 600, "watchdog": None, "scheduler": 300}, False, "ask for a longer time"),
    ],
)
def test_what_waits_within_something_loses_patience_first(seconds, fit, told):
    found, detail = ladder(seconds)
    assert found == fit and told in detail
