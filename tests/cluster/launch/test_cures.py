"""What a scheduler's command line, or its absence, refuses can be mended as its message says: each cure is followed."""

from __future__ import annotations

import os
import re
import shlex
import sys

import pytest
import yaml

from mixcl_dist import cli
from mixcl_dist.cluster.launch import ray
from mixcl_dist.cluster.launch.hosts import commands
from mixcl_dist.cluster.launch.job import Job, LaunchError
from mixcl_dist.cluster.launch.kubernetes import Cluster, apply, manifests
from mixcl_dist.cluster.launch.slurm import Allocation, script, submit

COMMAND = ("pretrain", "--data", "d", "--run", "r")
PODS = Cluster(image="i", claim="c")
KUBERNETES = ["launch", "kubernetes", "--image", "i", "--claim", "c"]

SBATCH = """
import sys
if "#SBATCH --partition=nowhere" in sys.stdin.read():  # in sbatch's own words
    print("sbatch: error: invalid partition specified: nowhere", file=sys.stderr)
    print("sbatch: error: Batch job submission failed: Invalid partition name specified", file=sys.stderr)
    sys.exit(1)
print("17;cluster")
"""
SILENT = "import sys; sys.exit(3)"
SINFO = 'print("PARTITION AVAIL\\ngpu* up")'
KUBECTL = """
import pathlib, sys
chosen = pathlib.Path(__file__).with_name("chosen")
if sys.argv[1:3] == ["config", "use-context"]:
    chosen.write_text(sys.argv[3])
elif not chosen.exists():  # in kubectl's own words
    print('error: error validating "STDIN": error validating data: failed to download openapi: Get', file=sys.stderr)
    print('"http://localhost:8080/openapi/v2": dial tcp 127.0.0.1:8080: connect: connection refused', file=sys.stderr)
    sys.exit(1)
else:
    print("job.batch/mixcl-r created")
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A machine that has no programs but those that it is given."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))

    def give(**source: str) -> None:
        for name, text in source.items():
            (programs / name).write_text(f"#!{sys.executable}\n{text}")
            (programs / name).chmod(0o755)

    return give


def refused(said: str, check, *given) -> str:
    with pytest.raises(LaunchError) as error:
        check(*given)
    found = re.search(said, str(error.value))
    assert found and "\n" not in str(error.value), str(error.value)
    return found[1] if found.groups() else ""


def test_without_a_scheduler_what_would_be_handed_to_it_is_looked_at(site, tmp_path, capsys):
    looks = refused("or look at it with (--dry-run)", submit, "#!/bin/bash", tmp_path)
    assert cli.main(["launch", "slurm", looks, "--", *COMMAND]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH")
    looks = refused("install it, or look at the manifests with (--dry-run)", apply, "")
    assert cli.main([*KUBERNETES, looks, "--", *COMMAND]) == 0
    assert [one["kind"] for one in yaml.safe_load_all(capsys.readouterr().out)] == ["Service", "Job"]


def test_a_partition_that_the_site_has_not_is_exchanged_for_one_that_sinfo_tells(site, tmp_path):
    site(sbatch=SBATCH, sinfo=SINFO)
    wrong = script(Job(COMMAND), Allocation(partition="nowhere"))
    said = "^sbatch: invalid partition specified: nowhere; give the options that this site knows, as (sinfo) and its"
    partition = os.popen(refused(said, submit, wrong, tmp_path)).read().split()[2].rstrip("*")
    assert submit(script(Job(COMMAND), Allocation(partition=partition)), tmp_path) == "17"


def test_a_scheduler_that_says_nothing_is_told_of_all_the_same(site, tmp_path):
    site(sbatch=SILENT)
    refused("^sbatch: ended with 3; give the options", submit, "#!/bin/bash", tmp_path)
    site(sbatch=SBATCH)
    assert submit("#!/bin/bash", tmp_path) == "17"


def test_a_cluster_that_is_not_there_is_exchanged_for_another(site):
    site(kubectl=KUBECTL)
    text = manifests(Job(COMMAND), PODS)
    command = refused("connection refused; mend that, or choose another cluster by (kubectl .*)$", apply, text)
    os.system(f"{command} {shlex.quote('other')}")
    assert apply(text) == "job.batch/mixcl-r created\n"


def test_a_name_that_no_pod_may_have_is_shortened():
    long = ("pretrain", "--data", "d", "--run", "x" * 60)
    option = refused("longer than 50 letters; give (--run) a shorter name", manifests, Job(long), PODS)
    assert manifests(Job(("pretrain", "--data", "d", option, "x" * 40)), PODS)


def test_the_doctor_is_started_where_there_is_no_run_to_keep(capsys):
    doctor = Job(("doctor", "--cluster"))
    way = refused(
        "start it by mixcl (launch hosts), or srun", lambda: ray.run(doctor, cli.main, address="", failures=0)
    )
    words = [*way.split(), "--hosts", "a,b", "--dry-run", "--", *doctor.command]
    assert cli.main(words) == 0 and len(capsys.readouterr().out.splitlines()) == len(commands(doctor, ["a", "b"]))
