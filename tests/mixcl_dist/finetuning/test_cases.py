"""A case that another trial has read is the one that it was read from, and lies in memory once for all of them."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest

from mixcl_dist.finetuning import cases as cases_module
from mixcl_dist.finetuning.cases import Cases
from mixcl_dist.finetuning.task import open_task

SPACING = (6.0, 6.0, 6.0)
PROCESSES = 16


@pytest.fixture(scope="module")
def task(data):
    return open_task(data)


def test_what_is_kept_is_what_was_read(task, tmp_path, monkeypatch):
    case = task.cases[0]
    plain, kept = Cases(task), Cases(task, tmp_path)
    for _ in range(2):
        volume, shown = kept.training(case, SPACING)
        known, known_shown = plain.training(case, SPACING)
        assert np.array_equal(volume.hu, known.hu) and np.array_equal(volume.target, known.target)
        assert np.array_equal(volume.known, known.known) and np.array_equal(shown, known_shown)
        own, known_own = kept.volume(case), plain.volume(case)
        assert np.array_equal(own.hu, known_own.hu) and np.array_equal(own.label, known_own.label)
        assert np.array_equal(own.affine, known_own.affine)
        monkeypatch.setattr(cases_module, "read_case", lambda *arguments: pytest.fail("was read again"))
        plain = Cases(task, tmp_path)


def test_another_spacing_other_classes_and_another_content_are_read_anew(task, tmp_path, monkeypatch):
    Cases(task, tmp_path).training(task.cases[0], SPACING)
    made = len(list(tmp_path.glob("*.json")))
    Cases(task, tmp_path).training(task.cases[0], None)
    assert len(list(tmp_path.glob("*.json"))) == made + 1
    monkeypatch.setattr(cases_module, "_content", lambda path: "changed")
    Cases(task, tmp_path).training(task.cases[0], SPACING)
    assert len(list(tmp_path.glob("*.json"))) == made + 2


def hold(task, folder, spacing, ready, go):
    """Read every voxel of all cases, and tell how much memory this process has of them (PSS, kB)."""
    volumes = [Cases(task, folder).training(case, spacing)[0] for case in task.cases if case.labels]
    total = sum(int(volume.hu.sum()) + int(volume.target.sum()) for volume in volumes)
    ready.put(total)
    go.wait()
    ready.put(sum(shares_of(folder)))
    go.wait()


def shares_of(folder):
    """PSS in kB of each mapping of a file in a folder (proc(5))."""
    mapped = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            mapped = str(folder) in line
        elif mapped and line.startswith("Pss:"):
            yield int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory is told apart by Linux alone")
def test_sixteen_trials_have_the_cases_in_memory_as_often_as_one(task, tmp_path):
    context = multiprocessing.get_context("fork")  # which need not import anything again

    def share(count):
        ready, barrier = context.Queue(), context.Barrier(count)
        arguments = (task, tmp_path / "cases", SPACING, ready, barrier)
        processes = [context.Process(target=hold, args=arguments) for _ in range(count)]
        for process in processes:
            process.start()
        sums = {ready.get(timeout=300) for _ in processes}
        shares = [ready.get(timeout=300) for _ in processes]
        for process in processes:
            process.join(60)
        assert len(sums) == 1
        return sum(shares)

    one, many = share(1), share(PROCESSES)
    print(f"PSS of the cases: 1 trial {one} kB, {PROCESSES} trials {many} kB together, {many / one:.2f} times")
    assert one > 1000 and many < 1.3 * one
