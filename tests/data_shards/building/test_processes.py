"""Work in processes: what kills its process is set aside, on one machine and on Ray, and takes nothing with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from mixcl_dist.cluster.work import on_ray
from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.building.processes import in_processes, in_this_process
from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.data_shards.sources import Case

from .reading import published, script


@pytest.mark.slow
def test_a_build_on_ray_gives_the_same_bytes_and_sets_a_deadly_case_aside(cohort, small_config, tmp_path):
    source, deadly = cohort("a", "b", "c"), cohort("d")
    build([source], tmp_path / "here", small_config, run=in_this_process)

    with on_ray("local", written=tmp_path / "there", read=[source, deadly]) as run:

        def killing(work, items):
            def kill_or_work(item):
                if isinstance(item[0], Case) and item[0].name == "d":
                    os.kill(os.getpid(), signal.SIGKILL)
                return work(item)

            return run(kill_or_work, items)

        result = build([source, deadly], tmp_path / "there", small_config, run=killing)
    (line,) = map(str, result.quarantined)
    assert "d.nii.gz: the process that read it died (a fault in a decoder, or killed)" in line
    assert published(tmp_path / "there") == published(tmp_path / "here")
    again = build([source, deadly], tmp_path / "there", small_config, run=in_this_process)
    assert again.quarantined == [] and again.added == 1, "what died is tried again"


@pytest.mark.slow
def test_a_case_that_kills_its_process_is_set_aside_and_the_others_are_built(cohort, tmp_path):
    patch = """
    read = spool.read_case
    def read_case(case, *arguments):
        if case.name == "b":
            os.abort()
        return read(case, *arguments)
    spool.read_case = read_case
    """
    command = [sys.executable, script(tmp_path, patch), cohort("a", "b", "c"), tmp_path / "out", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert "b.nii.gz: the process that read it died" in line
    assert [case.name for case in Manifest.load(tmp_path / "out").cases] == ["a", "c"]


DEADLY = "__import__('os')._exit(1)"


def test_each_item_comes_back_once_and_one_that_kills_its_process_takes_no_other_with_it():
    items = ["1 + 1", DEADLY, "2 * 3", "7 - 3"]
    came = {item: (result, death) for item, result, death in in_processes(2)(eval, items)}
    assert sorted(came) == sorted(items)
    assert "out of memory" in str(came.pop(DEADLY)[1])
    assert came == {item: (eval(item), None) for item in items if item != DEADLY}


def test_what_work_raises_comes_out():
    with pytest.raises(ZeroDivisionError):
        list(in_processes(1)(eval, ["1 / 0"]))
