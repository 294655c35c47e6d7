"""Hosts as namespaces are cut off, killed and come back, and the table says what was measured."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "faults"


@pytest.fixture
def faults(monkeypatch):
    """Imports a module of the benchmark as its program would."""
    monkeypatch.syspath_prepend(FOLDER)
    yield import_module
    for name in ("machines", "run", "rank"):
        sys.modules.pop(name, None)


def test_the_table_has_the_median_and_the_spread_of_each_fault(faults):
    run = faults("run")
    found = [run.Seconds("cut off", seconds, 7, 20.0) for seconds in (30.0, 50.0, 34.0)]
    found += [run.Seconds("killed", seconds, 3, 21.0) for seconds in (22.0, 20.0, 90.0)]
    lines = run.tabulated(found).splitlines()
    assert any(line.startswith("cut off") and "34 (30 to 50)" in line and "7 (7 to 7)" in line for line in lines)
    assert any(line.startswith("killed") and "22 (20 to 90)" in line for line in lines)
    assert lines[-1] == "median of all 32 s: within the bar of 60 s"


@pytest.mark.parametrize(("longest", "said"), [(21.0, "within"), (31.0, "ABOVE")])
def test_the_table_of_lost_ranks_judges_the_longest(faults, longest, said):
    lines = faults("rank").tabulated({"killed": [2.0, 3.0, 4.0], "frozen": [19.0, longest]}).splitlines()
    assert any(line.startswith("killed") and "3 (2 to 4)" in line for line in lines)
    assert lines[-1] == f"longest {longest:.0f} s: {said} the bar of 30 s"


@pytest.mark.cluster
def test_a_host_is_there_unless_it_is_cut_off_or_killed(faults):
    hosts = faults("machines")
    if reason := hosts.missing():
        pytest.skip(reason)
    with hosts.machines() as two:

        def says(name, command="hostname"):
            ssh = ["ssh", "-o", "ConnectTimeout=2", name, command]
            return subprocess.run(ssh, env=two.environment, capture_output=True, text=True).stdout.strip()

        assert [says("a"), says("b")] == ["a", "b"]
        assert says("a", "timeout 3 bash -c 'echo > /dev/tcp/b/22' && echo reached") == "reached"
        for strike, mend in ((two.cut_off, two.connect), (two.kill, two.start)):
            strike("b")
            assert [says("a"), says("b")] == ["a", ""]
            mend("b")
            assert says("b") == "b"
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, env={"PATH": hosts.PATH}).stdout
    assert two.folder.name not in left
