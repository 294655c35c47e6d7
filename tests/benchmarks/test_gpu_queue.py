"""The queue for a GPU machine: what is run, in which order, for how long, and what is kept of it; without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from importlib import import_module
from pathlib import Path

import pytest

from mixcl_dist.studies.ledger import Ledger

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


@pytest.fixture(autouse=True)
def siblings(monkeypatch):
    """The modules import each other as their own command would; other benchmarks have some of the same names."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


def load(name: str):
    return import_module(name)


# Time


def test_stages_share_the_time_and_pass_on_what_they_leave():
    shares = load("work_queue").Shares(100, {"a": 1, "b": 1, "c": 2})
    assert shares.deadline("a") - time.monotonic() == pytest.approx(25, abs=4)
    assert shares.deadline("b") - time.monotonic() == pytest.approx(100 / 3, abs=4)  # the first took no time
    assert shares.deadline("c") - time.monotonic() == pytest.approx(100, abs=4)


def test_a_wave_weighs_as_much_as_its_longest_job():
    stages = load("stages")
    jobs = [stages.Job("p", (str(k),), limit, (), wave=k // 2) for k, limit in enumerate((10, 30, 5, 5))]
    assert load("work_queue").weight(jobs) == 35


# Running jobs


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A queue whose programs are those that a test writes into its folder."""
    module = load("work_queue")
    monkeypatch.setattr(module, "LEAST", 0.0)
    return module.Queue(
        Ledger(tmp_path / "out" / "ledger.jsonl", "a card"),
        tmp_path,
        tmp_path / "out",
        tiny=False,
        root=tmp_path,
        folder=tmp_path,
    )


def job(queue, body: str, *items: str, limit: float = 60, **rest):
    """A job whose program runs `body` for every `item`."""
    name = f"program{len(list(queue.root.glob('program*')))}.py"
    head = "import json, os, pathlib, sys, time\nitems = [word for word in sys.argv[1:] if word.startswith('x/')]\n"
    head += "def tell(**figures): print(json.dumps({'item': item, **figures}), flush=True)\nfor item in items:\n"
    (queue.root / name).write_text(head + textwrap.indent(textwrap.dedent(body), "    "))
    return load("stages").Job(name, items, limit, (name,), **rest)


def states(queue, job) -> dict[str, str]:
    return {item: queue.state(job, item) for item in job.items}


def soon(seconds: float = 60) -> float:
    return time.monotonic() + seconds


def test_items_are_recorded_with_their_figures(queue):
    one = job(queue, "tell(ms=3, text='fine')", "x/a", "x/b")
    queue.run_stage([one], soon())
    assert states(queue, one) == {"x/a": "done", "x/b": "done"}
    assert queue.ledger.records["x/b"]["ms"] == 3 and not queue.wrong


def test_an_item_that_fails_has_its_last_line_and_stops_no_other(queue):
    body = "tell() if item != 'x/b' else sys.exit(print('what follows') or 'illegal memory access')"
    one = job(queue, body, "x/a", "x/b", "x/c")
    queue.run_stage([one], soon())
    assert states(queue, one) == {"x/a": "done", "x/b": "failed", "x/c": "done"}
    assert "illegal memory access" in queue.ledger.records["x/b"]["text"]
    assert queue.wrong == ["x/b"]


def test_a_program_that_hangs_is_killed_at_its_limit(queue):
    one = job(queue, "time.sleep(600)", "x/a", limit=1.5)
    queue.run_stage([one], soon())
    assert states(queue, one) == {"x/a": "failed"} and "not done within" in queue.ledger.records["x/a"]["text"]


def test_what_the_stage_has_no_time_for_is_missing_and_not_wrong(queue):
    one = job(queue, "tell() if item == 'x/a' else time.sleep(600)", "x/a", "x/b", "x/c")
    queue.run_stage([one], soon(5))
    assert states(queue, one) == {"x/a": "done", "x/b": "missing", "x/c": "missing"}
    assert not queue.wrong


def test_what_is_known_is_not_measured_again_until_its_sources_change(queue):
    one = job(queue, "tell(at=time.time())", "x/a")
    queue.run_stage([one], soon())
    first = queue.ledger.records["x/a"]
    queue.run_stage([one], soon())
    assert queue.ledger.records["x/a"] == first
    program = queue.root / one.program
    program.write_text(program.read_text() + "# changed\n")
    assert states(queue, one) == {"x/a": "stale"}
    queue.run_stage([one], soon())
    assert queue.ledger.records["x/a"]["at"] > first["at"]


def test_what_is_missing_comes_before_what_is_stale_and_that_before_what_failed(queue):
    one = job(queue, "tell(at=time.time())", "x/failed", "x/stale", "x/missing")
    queue.ledger.add("x/stale", "of other sources", "done")
    queue.ledger.add("x/failed", queue.digest(one), "failed")
    queue.run_stage([one], soon())
    times = {item: record["at"] for item, record in queue.ledger.records.items()}
    assert sorted(times, key=times.get) == ["x/missing", "x/stale", "x/failed"]


def test_no_kernel_that_failed_its_gate_is_timed(queue):
    gate = job(queue, "tell(passed=item != 'x/wrong', text='gradient error 1')", "x/right", "x/wrong")
    barred = job(queue, "tell()", "x/timing", barred_by=("x/right", "x/wrong"), wave=1)
    free = job(queue, "tell()", "x/other", barred_by=("x/right",), wave=1)
    queue.run_stage([gate, barred, free], soon())
    assert states(queue, barred) == {"x/timing": "missing"} and states(queue, free) == {"x/other": "done"}
    assert queue.wrong == ["x/wrong", "x/timing"]


def test_what_others_need_is_made_once_and_only_for_them(queue):
    make = job(queue, "pathlib.Path('made').write_text('') or tell()", "x/make", makes="made")
    use = job(queue, "assert pathlib.Path('made').exists(); tell()", "x/use", needs=("made",), wave=1)
    queue.run_stage([make], soon())
    assert not (queue.root / "made").exists()  # nobody needs it
    queue.run_stage([make, use], soon())
    assert states(queue, use) == {"x/use": "done"}
    (queue.root / "made").unlink()
    assert queue.wanted([make, use]) == []  # nor now


def test_what_needs_something_that_could_not_be_made_is_left_out(queue):
    make = job(queue, "sys.exit('no space left')", "x/make", makes="made")
    use = job(queue, "tell()", "x/use", needs=("made",), wave=1)
    queue.run_stage([make, use], soon())
    assert states(queue, use) == {"x/use": "missing"} and queue.wrong == ["x/make"]


def test_the_jobs_of_a_wave_run_side_by_side(queue):
    body = (
        "pathlib.Path(item[2:]).write_text('')\nwhile len(list(pathlib.Path('.').glob('lane*'))) < 3: time.sleep(0.01)"
    )
    jobs = [job(queue, f"{body}\ntell()", f"x/lane{k}") for k in range(3)]
    queue.run_stage(jobs, soon())
    assert all(state == "done" for one in jobs for state in states(queue, one).values())


def test_a_killed_run_leaves_no_program_behind(queue, tmp_path):
    one = job(queue, "pathlib.Path('pid').write_text(str(os.getpid())) and time.sleep(60)", "x/a")
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "import work_queue, stages, pathlib, time\n"
        "from mixcl_dist.studies import ledger\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "kept = ledger.Ledger(here / 'o' / 'l', 'c')\n"
        "queue = work_queue.Queue(kept, here, here / 'o', False, root=here, folder=here)\n"
        f"queue.run_stage([stages.Job({one.program!r}, ('x/a',), 60, ())], time.monotonic() + 60)\n"
    )
    process = subprocess.Popen([sys.executable, driver])
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    program = Path("/proc") / (tmp_path / "pid").read_text()
    process.kill()
    process.wait()
    until(lambda: not program.exists() or "Z" in (program / "stat").read_text().rpartition(")")[2].split()[0])


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# A bare machine


def begun_without_packages(*words: str) -> subprocess.CompletedProcess:
    """The command as a Python begins it that has nothing but its own library."""
    return subprocess.run([sys.executable, "-S", FOLDER / "run.py", *words], capture_output=True, text=True)


def test_the_command_begins_without_any_package():
    assert begun_without_packages("--help").returncode == 0


def test_the_pack_is_laid_out_before_what_it_holds_is_needed(tmp_path):
    pack, folder = load("pack"), tmp_path / "pack"
    folder.mkdir()
    content = [(b"raise SystemExit('found in the pack')", f"site/{name}.py") for name in ("numpy", "torch", "pydantic")]
    pack.make_part(folder, "site", "1", lambda: pack.write_archive(folder / "site.tar.xz", content))
    paths = [str(word) for name in ("pack", "work", "out") for word in (f"--{name}", tmp_path / name)]
    done = begun_without_packages("check", *paths, "--seconds", "60")
    assert done.stderr.strip() == "found in the pack"


# The plan and the summary


def test_every_stage_has_a_plan_whose_names_are_its_own():
    stages = load("stages")
    for tiny in (False, True):
        for stage in stages.NAMES:
            jobs = stages.plan(stage, ["bf16-256", "fp32-1024"], tiny)
            items = [item for job in jobs for item in job.items]
            assert items and len(set(items)) == len(items)
            assert all(item.startswith(f"{stage}/") for item in items)
            assert all((FOLDER / job.program).exists() for job in jobs)
            made = {job.makes: job.wave for job in jobs if job.makes}
            assert all(made[need] < job.wave for job in jobs for need in job.needs)
            root = FOLDER.parents[1]
            assert all(any(root.glob(pattern)) for job in jobs for pattern in job.sources if "yaml" not in pattern)


def test_the_sanitizer_sees_each_tensor_by_itself(tmp_path, monkeypatch):
    """Not the large pieces of memory that torch cuts them from, within which it would miss what is written beyond."""
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    *_, last = load("stages").plan("check", ["bf16-128"], False)
    done = subprocess.run([*last.launcher, "program"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "--tool", "memcheck", "--error-exitcode", "9", "program"]


def test_timing_waits_for_the_gate_of_every_entry():
    stages = load("stages")
    for stage in ("kernel", "step", "tiles"):
        timings = [job for job in stages.plan(stage, ["bf16-128"], False) if not job.makes]
        assert timings and all(job.barred_by == ("check/bf16-128",) for job in timings)


def test_the_summary_says_what_is_current_missing_and_wrong():
    states = {"check/a": "done", "check/b": "failed", "kernel/c": "missing"}
    records = {"check/a": {"text": "error 1e-4", "date": "2026-01-01"}, "check/b": {"text": "error 1"}}
    text = load("summary").write("a card", states, records, ["check/b"])
    assert "1 of 3 items are current" in text
    assert "| check/a | done | 2026-01-01 | error 1e-4 |" in text
    assert "Not measured in time: kernel/c." in text and "WRONG: check/b." in text


def test_the_summary_shows_the_rows_of_a_table_and_says_that_it_is_partial():
    records = {"table/few_label": {"text": "3 of 8 planned trials", "table": "scans  arm\n    1  scratch"}}
    text = load("summary").write("a card", {"table/few_label": "partial"}, records, [])
    assert "```\nscans  arm\n    1  scratch\n```" in text
    assert "Not measured in time: table/few_label." in text


def test_what_is_partial_is_gone_on_with_and_is_not_wrong(queue):
    body = "tell(partial=not pathlib.Path('half').exists(), text='3 of 8'); pathlib.Path('half').touch()"
    one = job(queue, body, "x/a")
    queue.run_stage([one], soon())
    assert states(queue, one) == {"x/a": "partial"} and not queue.wrong
    queue.run_stage([one], soon())
    assert states(queue, one) == {"x/a": "done"}


def test_records_are_plain_json(queue):
    one = job(queue, "tell(text='µs')", "x/a")
    queue.run_stage([one], soon())
    (line,) = (queue.out / "ledger.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == "µs"


def test_a_program_that_cannot_be_started_is_a_failure_like_others(queue):
    one = job(queue, "tell()", "x/a", launcher=("/nowhere/compute-sanitizer",))
    queue.run_stage([one], soon())
    assert states(queue, one) == {"x/a": "failed"} and "/nowhere" in queue.ledger.records["x/a"]["text"]
    assert queue.wrong == ["x/a"]


def test_what_a_sanitizer_finds_is_a_failure_whatever_the_program_reports(queue):
    launcher = ("bash", "-c", '"$@"; echo "$0 1 error"; exit 9', "sanitizer:")
    one = job(queue, "tell(text='right')", "x/a", launcher=launcher)
    queue.run_stage([one], soon())
    assert states(queue, one) == {"x/a": "failed"} and queue.wrong == ["x/a"]
    assert "exit code 9: sanitizer: 1 error" in queue.ledger.records["x/a"]["text"]


def test_a_program_without_reports_tells_by_its_exit_code(queue):
    fine, bad = job(queue, "print('0 errors')", "x/fine"), job(queue, "sys.exit('1 error')", "x/bad")
    queue.run_stage([fine, bad], soon())
    assert states(queue, fine) == {"x/fine": "done"} and states(queue, bad) == {"x/bad": "failed"}
    assert queue.ledger.records["x/fine"]["text"] == "0 errors"
