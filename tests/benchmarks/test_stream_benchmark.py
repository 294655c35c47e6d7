"""The stream benchmark runs from end to end, compares what holds the same samples, and its gate lets no other pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from importlib import import_module
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import pytest
import torch
import xxhash

from mixcl_dist.data_shards.building.build import build

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "stream"


@pytest.fixture(scope="module")
def benchmark():
    """Imports a module of the benchmark as its own command would; they are siblings, not a package."""
    sys.path.insert(0, str(FOLDER))
    before = set(sys.modules)
    threads = torch.get_num_threads()
    yield import_module
    torch.set_num_threads(threads)
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


@pytest.fixture(scope="module")
def data(benchmark, tmp_path_factory) -> Path:
    """A corpus of twelve patches of two synthetic scans, without litdata and mosaicml-streaming."""
    corpus = benchmark("corpus")
    folder = tmp_path_factory.mktemp("corpus")
    scans = folder / "sources"
    scans.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        hu = rng.integers(-100, 100, (100, 100, 110), dtype=np.int16)
        nib.save(nib.Nifti1Image(hu, np.diag([2.0, 2.0, 2.0, 1.0])), scans / f"{name}.nii.gz")
    build([scans], folder / "shards", corpus.CONFIG)
    corpus.write_npz(folder / "shards", folder / "npz")
    return folder


@pytest.mark.slow
def test_the_command_measures_and_reports(ct, tmp_path):
    command = [sys.executable, FOLDER / "run.py", "--quick", "--ct", ct, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert not results["left_out"]
    assert {timing["name"] for timing in results["timings"]} == set(gated := [one["name"] for one in results["gate"]])
    assert {"PatchStream", "webdataset, npz", "decoding alone"} <= set(gated)
    assert all(rate > 0 for timing in results["timings"] for rate in timing["patches_per_second"])
    summary = (tmp_path / "summary.md").read_text()
    assert "## Bars" in summary and "15× as fast as webdataset, npz" in summary
    assert "not measured" in summary, "litdata and mosaicml-streaming were not there"
    assert (tmp_path / "throughput.png").stat().st_size > 5000


@pytest.mark.slow
def test_all_formats_hold_the_same_voxels(benchmark, data):
    found = []
    for path in sorted((data / "npz").glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [np.load(tar.extractfile(member))["image"] for member in tar]
    wanted = benchmark("corpus").truth(data / "shards")
    assert len(set(wanted)) == len(wanted) > 8
    assert [xxhash.xxh3_128_hexdigest(image.tobytes()) for image in found] == wanted
    assert {(image.dtype, image.shape) for image in found} == {(np.dtype("int16"), (96, 96, 96))}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_every_contestant_delivers_every_sample_once(benchmark, data, workers):
    contestants, host, corpus = map(benchmark, ("contestants", "host", "corpus"))
    wanted = sorted(corpus.truth(data / "shards"))
    for name, contestant in contestants.CONTESTANTS.items():
        found = [digest for batch in contestant(data, 4, workers).epoch() for digest in host.digests(batch)]
        assert sorted(found) == wanted, name


@pytest.mark.slow
def test_the_stream_that_is_timed_has_no_end(benchmark, data):
    contestants, host = map(benchmark, ("contestants", "host"))
    for name in benchmark("run").HERE:
        stream = contestants.CONTESTANTS[name](data, 8, 1).endless()
        assert sum(host.touch(next(stream)) for _ in range(6)) >= 48, name


def patches(*values: int) -> torch.Tensor:
    """(values, 1, 96, 96, 96) int16."""
    return torch.tensor(values, dtype=torch.int16)[:, None, None, None, None].expand(-1, 1, 96, 96, 96)


@pytest.mark.parametrize(
    ("epoch", "why"),
    [
        ([patches(0, 1), patches(2, 3)], None),
        ([patches(3, 2, 1, 0)], None),
        ([patches(1, 2, 3)], "of 4 samples 1 are missing, 0 are others"),
        ([patches(0, 1, 2, 3), patches(0)], "of 4 samples 0 are missing, 1 are others or come twice"),
        ([patches(0, 1, 2, 4)], "of 4 samples 1 are missing, 1 are others"),
    ],
)
def test_the_gate_passes_the_samples_of_the_corpus_alone(benchmark, epoch, why):
    run, host, corpus = map(benchmark, ("run", "host", "corpus"))

    class Process:
        def ask(self, command):
            return [digest for batch in epoch for digest in host.digests(batch)] if command == "epoch" else {}

    wanted = [xxhash.xxh3_128_hexdigest(np.full((96, 96, 96), number, np.int16).tobytes()) for number in range(4)]
    answer = run.passes_gate(corpus.Corpus(Path(), wanted, {}), Process())
    assert answer is None if why is None else answer.startswith(why)


def test_voxels_of_another_type_are_not_compared(benchmark):
    with pytest.raises(TypeError, match=r"torch\.float32 where int16"):
        benchmark("host").digests(patches(0).float())


FAKE = """
import threading, time
import torch


class Fake:
    def __init__(self, data, batch_size, workers):
        self.log = data / "log"

    def epoch(self):
        raise OSError("no such shard")

    def endless(self):
        threading.Thread(target=self.work, daemon=True).start()
        while True:
            time.sleep(0.01)
            yield torch.zeros((4, 1, 96, 96, 96), dtype=torch.int16)

    def work(self):
        while True:
            with self.log.open("a") as log:
                log.write("x")
            time.sleep(0.01)


CONTESTANTS = {"Fake": Fake}
"""


@pytest.fixture
def fake(benchmark, tmp_path, monkeypatch):
    """The contestant of FAKE in its process."""
    (tmp_path / "fakes.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [sys.executable, str(FOLDER / "host.py"), "fakes", "Fake", str(tmp_path), "4", "1"]
    process = benchmark("run").Process("Fake", command)
    yield process
    process.close()


def test_a_contestant_that_fails_says_why(benchmark, fake):
    run, corpus = map(benchmark, ("run", "corpus"))
    assert run.passes_gate(corpus.Corpus(Path(), [], {}), fake) == "failed: OSError: no such shard"


def test_a_contestant_stands_still_while_it_is_not_its_turn(fake, tmp_path):
    fake.ask("begin")
    while _state(fake._process.pid) != "T":  # the signal is under way
        time.sleep(0.01)
    before = (tmp_path / "log").stat().st_size
    time.sleep(0.5)
    assert (tmp_path / "log").stat().st_size == before
    lap = fake.ask("turn 0.3")
    assert lap["patches"] == 4 * lap["batches"] and lap["batches"] >= 4 and lap["seconds"] >= 0.3
    assert lap["patches"] / lap["seconds"] < 4 / 0.01
    assert (tmp_path / "log").stat().st_size > before


@pytest.mark.slow
def test_a_contestant_ends_with_its_workers(benchmark, data, tmp_path):
    command = [sys.executable, str(FOLDER / "host.py"), "contestants", "webdataset, blosc2", str(data), "4", "2"]
    process = benchmark("run").Process("webdataset", command)
    process.ask("begin")
    group = process._process.pid
    process.close()
    deadline = time.monotonic() + 60
    while left := [pid for pid in os.listdir("/proc") if pid.isdigit() and _lives_in(group, pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _lives_in(group: int, pid: str) -> bool:
    try:
        return os.getpgid(int(pid)) == group and _state(pid) != "Z"
    except OSError:
        return False


def _state(pid: int | str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def results(**rates: list[float]) -> dict:
    """Timings at one setting, of contestants by their names."""
    found = {"PatchStream": [1200.0] * 3, "decoding alone": [1500.0] * 3, "webdataset, blosc2": [240.0] * 3}
    found |= {"webdataset, npz": [60.0] * 3, "litdata, blosc2": [300.0] * 3, "litdata, array": [200.0] * 3}
    found |= {"mosaicml-streaming, array": [100.0, 300.0, 500.0]} | rates
    timings = [
        {"name": name, "workers": 1, "batch_size": 8, "patches_per_second": laps} for name, laps in found.items()
    ]
    return {"timings": timings}


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"webdataset, blosc2": [241.0] * 3}, ["webdataset, blosc2"]),
        ({"webdataset, npz": [81.0] * 3}, ["npz"]),
        ({"litdata, array": [401.0] * 3}, ["litdata"]),
        ({"mosaicml-streaming, array": [100.0, 401.0, 500.0]}, ["mosaic"]),
        ({"decoding alone": [1715.0] * 3}, ["decoding alone"]),
    ],
)
def test_bars_hold_against_the_fastest_of_a_family(benchmark, change, missed):
    found = benchmark("report").bars(results(**change))
    assert len(found) == 5
    names = [bar.name for bar in found if not bar.met]
    assert len(names) == len(missed) and all(word in name for word, name in zip(missed, names, strict=True))


def test_a_bar_counts_the_setting_where_the_stream_does_worst(benchmark):
    both = results()
    slower = [{**timing, "workers": 2} for timing in results(PatchStream=[700.0] * 3)["timings"]]
    found = benchmark("report").bars({"timings": both["timings"] + slower})
    assert [bar.met for bar in found] == [False, False, False, False, False]
    assert all("2 workers" in bar.figure for bar in found)


def test_bars_without_their_measurements_are_not_measured(benchmark):
    assert {bar.verdict for bar in benchmark("report").bars({"timings": []})} == {"not measured"}


@pytest.mark.slow
def test_resuming_in_a_large_index_is_measured(tmp_path):
    command = [sys.executable, FOLDER / "resume.py", "--samples", "50000", "--rounds", "1", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads((tmp_path / "resume.json").read_text())["runs"]
    assert run["slot"] == 4992 and len(run["first_samples"]) == 3
    assert 0 < run["imports_bytes"] <= run["peak_bytes"] and run["construct_seconds"] < run["process_seconds"]
    assert "MB per million patches" in (tmp_path / "resume.md").read_text()


@pytest.mark.slow
def test_payloads_are_read_without_code_of_ours(benchmark, data):
    """The truth that contestants are held to: webdataset's members, blosc2's decoder."""
    (first, *_) = sorted((data / "shards").glob("shard-*.tar"))
    payloads = benchmark("corpus").payloads(first)
    decoded = [np.frombuffer(blosc2.decompress(payload), np.int16) for payload in payloads.values()]
    assert decoded and all(-100 <= hu.min() < hu.max() < 100 and hu.size == 96**3 for hu in decoded)
