"""What is refused of a group, a job or a cluster can be mended as its message says: each cure is followed here."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from mixcl_dist.cluster.errors import ClusterError
from mixcl_dist.cluster.group import described
from mixcl_dist.cluster.launch.hosts import commands, read_hosts
from mixcl_dist.cluster.launch.job import Job
from mixcl_dist.cluster.launch.slurm import Allocation
from mixcl_dist.cluster.ray import check_resources
from mixcl_dist.cluster.trials import TrialsConfig, run_trials

from .test_group import MPIEXEC, MPIRUN, SRUN, TORCHRUN

COMMAND = ("pretrain", "--data", "d", "--run", "r")


class Fault(NamedTuple):
    check: Callable[[Any], object]
    given: Any
    said: str
    cured: Any


def without(environment, *prefixes):
    return {key: value for key, value in environment.items() if not key.startswith(prefixes)}


def group_of(environment, said, **changed):
    """A fault of variables that is cured by what the message says to unset."""
    return Fault(described, environment, said, without(environment, *changed["unset"]))


def job(given):
    return Job(given.get("command", COMMAND), **{k: v for k, v in given.items() if k != "command"}).run


def started_on(hosts):
    return commands(Job(COMMAND), hosts)


UNSET = "or unset RANK and WORLD_SIZE$"
GROUP = ("RANK", "WORLD_SIZE")
FAULTS = {
    "world size is text": group_of({"WORLD_SIZE": "x"}, UNSET, unset=GROUP),
    "rank alone": group_of({"RANK": "1"}, UNSET, unset=GROUP),
    "no head": group_of({"WORLD_SIZE": "2", "RANK": "1"}, UNSET, unset=GROUP),
    "rank beyond": group_of(TORCHRUN | {"RANK": "4"}, UNSET, unset=GROUP),
    "local rank is text": group_of(TORCHRUN | {"LOCAL_RANK": "x"}, UNSET, unset=GROUP),
    "torchrun": Fault(described, {"RANK": "1"}, "start with torchrun", TORCHRUN),
    "port is text": Fault(
        described, TORCHRUN | {"MASTER_PORT": "http"}, "give a port from 1 to 65535",
        TORCHRUN | {"MASTER_PORT": "65535"},
    ),
    "port beyond": Fault(
        described, SRUN | {"MASTER_PORT": "65536"}, "give a port from 1 to 65535", SRUN | {"MASTER_PORT": "1"}
    ),
    "srun's rank is empty": group_of(
        SRUN | {"SLURM_PROCID": ""}, "start with srun, or unset the SLURM_ variables", unset=("SLURM_",)
    ),
    "srun's rank beyond": group_of(
        SRUN | {"SLURM_PROCID": "4"}, "start with srun, or unset the SLURM_ variables", unset=("SLURM_",)
    ),
    "part of srun": group_of(
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "or unset the SLURM_ variables", unset=("SLURM_",)
    ),
    "mpirun's rank is text": group_of(
        MPIRUN | {"OMPI_COMM_WORLD_RANK": "x"}, "start with mpirun or mpiexec, or unset the OMPI_", unset=("OMPI_",)
    ),
    "mpiexec's local rank is text": group_of(
        MPIEXEC | {"MPI_LOCALRANKID": "x"}, "or unset the MPI_ variables", unset=("MPI_",)
    ),
    "mpirun on several machines": Fault(
        described, MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "set (MASTER_ADDR) to its name",
        MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "{}": "node1"},
    ),
    "nothing to run": Fault(
        job, {"command": ()}, "give a command behind --, e.g. -- pretrain --data", {"command": COMMAND}
    ),
    "job resumes": Fault(job, {"command": (*COMMAND, "--resume", "latest")}, "leave out --resume", {}),
    "job of another verb": Fault(job, {"command": ("tune",)}, "give -- pretrain", {}),
    "processes and GPUs": Fault(
        job, {"processes": 2, "gpus": 8}, r"2 processes for (8) GPUs.* each process takes one GPU",
        {"processes": 8, "gpus": 8},
    ),
    "no nodes": Fault(job, {"nodes": 0}, "nodes 0: at least 1 is needed", {"nodes": 1}),
    "job without run": Fault(job, {"command": COMMAND[:3]}, "has no --run; give it behind --", {"command": COMMAND}),
    "no host": Fault(read_hosts, ",", "give (a,b) or a file", "{}"),
    "host twice": Fault(started_on, ["a", "b", "a"], "one is named twice; leave it out", ["a", "b"]),
    "time": Fault(
        lambda time: Allocation(time=time), "1 day", "give minutes, hours:minutes:seconds or days-hours", "1-0"
    ),
    "sbatch option": Fault(
        lambda option: Allocation(options=(option,)), "constraint=a100", "give it as (--)name=value",
        "{}constraint=a100",
    ),
}  # fmt: skip


def filled(cured: Any, value: str) -> Any:
    if isinstance(cured, dict):
        return {key.replace("{}", value): content for key, content in cured.items()}
    return cured.replace("{}", value) if isinstance(cured, str) else cured


def refused(check: Callable[[Any], object], given: Any, said: str) -> str:
    with pytest.raises(ClusterError) as error:
        check(given)
    found = re.search(said, str(error.value))
    assert found and "\n" not in str(error.value), str(error.value)
    return found[1] if found.groups() else ""


@pytest.mark.parametrize("name", FAULTS)
def test_the_cure_that_is_said_helps(name):
    fault = FAULTS[name]
    value = refused(fault.check, fault.given, fault.said)
    fault.check(filled(fault.cured, value) if value else fault.cured)


WITHOUT_RAY = """
import sys
if sys.argv[1] == "without":
    sys.modules["ray"] = None  # an import of it fails
from mixcl_dist.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "command",
    ["shards build {data} --out {out} --ray {ray}", "launch ray --address {ray} -- pretrain --data d --run {out}"],
)
def test_where_there_is_no_ray_it_is_installed(tmp_path, command):
    (tmp_path / "data").mkdir()
    words = command.format(data=tmp_path / "data", out=tmp_path / "out", ray="127.0.0.1:1").split()

    def told(ray):
        done = subprocess.run([sys.executable, "-c", WITHOUT_RAY, ray, *words], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert told("without") == "mixcl: Ray is not installed here; pip install 'ray[tune]'\n"
    assert "start Ray there" in told("with"), "which is another thing to do"
    assert not (tmp_path / "out").exists()


def test_trials_without_ray_are_refused_before_any_is_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    asked = {"storage": tmp_path / "tune", "config": TrialsConfig(), "ended": print}
    said = r"^Ray is not installed here; pip install 'ray\[tune\]'$"
    refused(lambda trials: run_trials(print, trials, **asked), [{"id": "one"}], said)
    assert not (tmp_path / "tune").exists()


def test_a_trial_that_no_machine_can_run_is_lowered_to_what_is_said(monkeypatch):
    machines = [{"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}, {"Alive": True, "Resources": {"CPU": 8.0}}]
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: machines))

    def asked(amounts):
        check_resources({"trials.cpus": ("CPU", amounts[0]), "trials.gpus": ("GPU", amounts[1])}, on_one_machine=True)

    most = refused(asked, (64, 0), r"trials.cpus 64: the largest of 2 machines has (\d+); lower it")
    asked((float(most), 0))
    refused(asked, (8, 1), "trials.cpus, trials.gpus: no one machine has them together; lower one of them")
    asked((2, 1))
