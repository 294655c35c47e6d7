"""A process joins the group that its launcher described, or says in one line which variable it stumbles over."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixcl_dist.cluster.group import PORTS, Group, GroupError, check_address, described, first_host

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "4",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-head-1@1",
}  # fmt: skip
MPIEXEC = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def test_each_launcher_s_group_is_joined():
    assert described(TORCHRUN) == Group(1, 1, 4, "head", 29500)
    srun, mpirun, mpiexec = described(SRUN), described(MPIRUN), described(MPIEXEC)
    assert (srun.rank, srun.local_rank, srun.world_size, srun.address) == (3, 1, 4, "gpu07")
    assert (mpirun.rank, mpirun.local_rank, mpirun.world_size, mpirun.address) == (1, 1, 2, "127.0.0.1")
    assert (mpiexec.rank, mpiexec.world_size, mpiexec.address) == (1, 2, "127.0.0.1")
    assert {srun.port, mpirun.port, mpiexec.port} <= set(PORTS)


def test_all_ranks_of_a_job_meet_at_one_port_and_other_jobs_at_others():
    ports = {described(SRUN | {"SLURM_PROCID": str(rank)}).port for rank in range(4)}
    assert len(ports) == 1
    others = {described(SRUN | {"SLURM_JOB_ID": str(job)}).port for job in range(100)}
    assert len(others) > 90


def test_mpirun_within_a_slurm_job_is_not_taken_for_srun():
    """It starts its daemons by srun, whose variables its processes inherit."""
    group = described(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"} | MPIRUN)
    assert (group.rank, group.world_size) == (1, 2)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # in an sbatch script
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_without_a_launcher_a_process_is_a_group_of_one(environment):
    assert described(environment) == Group()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x'"),
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "MASTER_ADDR"),
        (TORCHRUN | {"RANK": "4"}, "RANK is 4, but WORLD_SIZE is 4"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_STEP_NUM_TASKS is not set"),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "set MASTER_ADDR"),
        (SRUN | {"SLURM_PROCID": ""}, "SLURM_PROCID is ''"),
    ],
)
def test_a_group_described_in_part_is_refused_with_its_variables(environment, said):
    with pytest.raises(GroupError, match=said):
        described(environment)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"), ("a,b", "a"), ("gpu[007-010,012],x", "gpu007"), ("n[3,5-7]-ib,b", "n3-ib"),
        ("r[1-2]n[05-06]", "r1n05"),
    ],
)  # fmt: skip
def test_the_first_host_of_slurm_s_lists(hosts, first):
    assert first_host(hosts) == first


def test_a_first_machine_that_nobody_knows_is_named():
    with pytest.raises(GroupError, match=r"nowhere.invalid, the machine of rank 0, is not known here; set MASTER_ADDR"):
        check_address(Group(0, 0, 2, "nowhere.invalid", 29500))
    check_address(Group())


@pytest.mark.parametrize(("ranks", "torn_down"), [(1, True), (2, False)])
def test_one_of_several_ranks_ends_before_a_thread_of_another_language_meets_a_dying_interpreter(ranks, torn_down):
    """Which would end the process by SIGABRT."""
    program = (
        "import atexit, sys; from mixcl_dist.cluster.group import leave\n"
        "class Last:\n    def __del__(self, write=sys.stdout.write): write('torn down ')\n"
        "last = Last(); atexit.register(print, 'tidied', end=' '); print('said', end=' '); leave(3)"
    )
    environment = os.environ | TORCHRUN | {"RANK": "0", "WORLD_SIZE": str(ranks)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stdout.split() == ["said", "tidied", *(["torn", "down"] if torn_down else [])]


names = st.sampled_from(sorted({*TORCHRUN, *SRUN, *MPIRUN, *MPIEXEC}))


@given(st.dictionaries(names, st.one_of(st.sampled_from(["", "0", "1", "2", "-1", "1.5", "²"]), st.text(max_size=4))))
def test_any_environment_is_a_group_or_one_line(environment):
    try:
        group = described(environment)
    except GroupError as error:
        assert "\n" not in str(error)
    else:
        assert 0 <= group.rank < group.world_size and (group.world_size == 1 or group.port)
