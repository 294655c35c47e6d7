"""Whatever is killed on a cluster, and however often, the same command ends with the table of an undisturbed study.

60 trials; `make test-study` runs 200.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


two_hosts = module(ROOT / "tests/cluster/two_hosts.py")
tiny_study = module(Path(__file__).with_name("tiny_study.py"))


def ended(study):
    """Trials that the ledger says are done, an entry for each line."""
    ledger = study / "ledger.jsonl"
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return [line["item"] for line in map(json.loads, lines) if line["status"] == "done"]


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.skipif(not two_hosts.can_be_made(), reason="network namespaces need root and iproute2")
def test_a_study_outlives_its_driver_its_raylets_and_its_machines(data, tmp_path):
    hosts, study = two_hosts.TwoHosts(Path(f"/tmp/ray-{os.getpid()}"), f"mixcl{os.getpid()}"), tmp_path / "study"
    hosts.environment["PYTHONPATH"] = str(ROOT)
    command = hosts.command("a", [sys.executable, tiny_study.__file__, str(data), str(study), hosts.address])
    disturbances = [  # share of the trials that have ended
        (0.1, lambda driver: driver.send_signal(signal.SIGKILL)),
        (0.25, lambda driver: hosts.kill("b")),  # the whole machine
        (0.4, lambda driver: driver.send_signal(signal.SIGKILL)),
        (0.55, lambda driver: hosts.kill("b", "raylet")),
        (0.7, lambda driver: driver.send_signal(signal.SIGKILL)),
    ]
    log = (tmp_path / "driver.log").open("w")
    try:
        for host in ("a", "b"):
            hosts.start(host)
        driver = subprocess.Popen(command, env=hosts.environment, stderr=log)
        for share, disturb in disturbances:
            while len(ended(study)) < share * tiny_study.SEEDS:
                assert driver.poll() is None, (tmp_path / "driver.log").read_text()[-3000:]
                time.sleep(0.1)
            disturb(driver)
            if not any("raylet" in two_hosts._name(str(pid)) for pid in hosts.pids("b")):
                hosts.kill("b")
                hosts.start("b")  # it comes back
            time.sleep(0.5)
            if driver.poll() is not None:
                driver = subprocess.Popen(command, env=hosts.environment, stderr=log)
        assert driver.wait(timeout=300) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    finally:
        hosts.end()
    undisturbed = [
        {
            "id": f"scratch-1-s{seed}",
            "seed": seed,
            "status": "done",
            "mean": tiny_study.dice_of(seed, 3),
            "class_mean": {"organ": 0.5},
            "reports": tuple((step, tiny_study.dice_of(seed, step)) for step in (1, 2)),
            "error": None,
        }
        for seed in range(tiny_study.SEEDS)
    ]
    assert tiny_study.rows(study) == undisturbed
    assert max(collections.Counter(ended(study)).values()) == 1, "nothing that had ended was run again"
    calls: collections.Counter = collections.Counter()
    for path in study.glob("trials/*/calls"):
        calls.update((path.parent.name, line.split()[0]) for line in path.read_text().splitlines())
    assert len(calls) == tiny_study.SEEDS * tiny_study.STEPS
    again = sum(calls.values()) - len(calls)
    print(f"{again} of {len(calls)} steps were done twice")
    assert again <= 5 * 4, "of each disturbance at most the steps that were under way"
