"""The kernel benchmark runs from end to end, its baselines compute what they say, and its gate lets no error pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from mixcl_dist.kernels import mixed_contrastive_loss

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "kernel"
CPU = torch.device("cpu")


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmark as its own command would; they are siblings, not a package."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield import_module
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


@pytest.mark.slow
def test_the_command_measures_and_reports(tmp_path):
    command = [sys.executable, FOLDER / "run.py", "--quick", "--device", "cpu", "--threads", "1", "--out", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    kinds = {record["kind"] for record in records}
    assert kinds >= {"machine", "matmul", "gate", "timing", "masking", "baseline", "large", "skipped", "bar"}
    assert all(record["passed"] for record in records if record["kind"] == "gate")
    assert all(record["both_ms"][0] > 0 for record in records if record["kind"] == "timing")
    timed = {record["name"] for record in records if record["kind"] == "baseline"}
    left_out = {
        record["what"].partition(" at N")[0]: record["why"] for record in records if record["kind"] == "skipped"
    }
    assert {"reference", "dense eager", "chunked eager"} <= timed
    assert not any(why.startswith("failed") for why in left_out.values())
    assert left_out["FlexAttention"] == "needs a GPU"
    summary = (tmp_path / "summary.md").read_text()
    for heading in ("## Bars", "## Correctness", "## The kernel", "## Baselines", "## Left out"):
        assert heading in summary
    assert "never slower than dense eager" in summary


@pytest.mark.parametrize("name", ["reference", "dense eager", "chunked eager", "MONAI", "pytorch-metric-learning"])
@pytest.mark.parametrize("count", [2, 130, 600])
def test_a_baseline_equals_the_reference(benchmark, monkeypatch, name, count):
    baselines, inputs, gate = map(benchmark, ("baselines", "inputs", "gate"))
    monkeypatch.setattr(baselines, "CHUNK", 256)
    baseline = next(baseline for baseline in baselines.BASELINES if baseline.name == name)
    if why_not := baseline.missing(CPU):
        pytest.skip(why_not)
    rows = inputs.make_rows(baseline.mix, count, 16, torch.float64, CPU)
    weights = {"identity_weight": baseline.identity_weight, "label_weight": baseline.label_weight}
    errors = gate.compare_baseline(baseline, replace(rows, **weights))
    assert max(errors.values()) < 1e-7  # MONAI's temperature is float32


@pytest.mark.parametrize("compiled", ["dense_compiled", "chunked_compiled"])
def test_what_is_compiled_is_what_was_checked(benchmark, monkeypatch, compiled):
    """Without the compiler, which would take longer than all other tests of this file."""
    baselines, inputs = map(benchmark, ("baselines", "inputs"))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    baselines._compiled_row_terms.cache_clear()
    rows = inputs.make_rows("realistic", 301, 16, torch.float64, CPU)
    assert getattr(baselines, compiled)(rows) == pytest.approx(baselines.reference(rows).item(), rel=1e-12)


@pytest.mark.parametrize("mix", ["realistic", "classes10", "infonce"])
@pytest.mark.parametrize("count", [256, 301, 1000])
def test_flex_attention_sees_the_members_of_the_identity_relation(benchmark, monkeypatch, mix, count):
    """Loss and gradient through the uncompiled operator, and block lists that say the same as the mask."""
    attention = import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(attention, "_validate_device", lambda *tensors: None)  # its eager backward runs on the CPU, too
    baselines, inputs, gate = map(benchmark, ("baselines", "inputs", "gate"))
    masks = []

    def spy(*tensors, block_mask, **options):
        masks.append(block_mask)
        return attention.flex_attention(*tensors, block_mask=block_mask, **options)

    monkeypatch.setattr(baselines, "flex_attention", spy)
    baseline = next(baseline for baseline in baselines.BASELINES if baseline.name == "FlexAttention")
    rows = inputs.make_rows(mix, count, 16, torch.float64, CPU)
    assert max(gate.compare_baseline(baseline, replace(rows, label_weight=0.0)).values()) < 1e-9

    lists = masks[0].kv_num_blocks, masks[0].kv_indices, masks[0].full_kv_num_blocks, masks[0].full_kv_indices
    member = attention.create_mask(masks[0].mask_mod, 1, 1, count, count, "cpu")[0, 0]
    for row in range(len(lists[0][0, 0])):
        masked, whole = (set(lists[k + 1][0, 0, row, : lists[k][0, 0, row]].tolist()) for k in (0, 2))
        assert not masked & whole
        for column in range(len(lists[0][0, 0])):
            block = member[128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)]
            if column in whole:
                assert block.all()
            elif column not in masked:
                assert not block.any()


@pytest.mark.parametrize("mix", ["realistic", "classes10", "infonce"])
def test_many_rows_are_compared_with_the_same_truth(benchmark, monkeypatch, mix):
    gate, inputs, baselines = map(benchmark, ("gate", "inputs", "baselines"))
    rows = inputs.make_rows(mix, 301, 16, torch.bfloat16, CPU)
    want = gate.truth(rows)
    monkeypatch.setattr(gate, "REFERENCE_ROWS", 300)
    monkeypatch.setattr(baselines, "CHUNK", 128)
    got = gate.truth(rows)
    for name in ("loss", "gradient", "temperature_gradient"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-10, atol=1e-10)


def wrong_loss(out):
    return out._replace(loss=out.loss * 1.001)


def wrong_gradient(out):
    return out._replace(loss=out.loss.detach() + 1.01 * (out.loss - out.loss.detach()))


def not_a_number(out):
    return out._replace(loss=out.loss * torch.nan)


def different_bits(out):
    return out._replace(lse=out.lse + 1e-6 * torch.rand_like(out.lse))


@pytest.mark.parametrize("spoil", [wrong_loss, wrong_gradient, not_a_number, different_bits])
def test_the_gate_catches_an_error(benchmark, monkeypatch, tmp_path, capsys, spoil):
    run, gate, inputs = map(benchmark, ("run", "gate", "inputs"))
    case = gate.Case("realistic", inputs.make_rows("realistic", 300, 64, torch.bfloat16, CPU))
    monkeypatch.setattr(gate, "cases", lambda device, quick: iter([case]))

    def spoilt(**arguments):
        out = mixed_contrastive_loss(**arguments)
        return out if arguments["implementation"] == "reference" else spoil(out)

    monkeypatch.setattr(gate, "mixed_contrastive_loss", spoilt)
    assert run.main(["--quick", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]) == 1
    assert "WRONG in" in capsys.readouterr().out
    kinds = {json.loads(line)["kind"] for line in (tmp_path / "results.jsonl").read_text().splitlines()}
    assert "gate" in kinds and "timing" not in kinds


def test_an_exception_fails_the_gate(benchmark, tmp_path, capsys):
    run = benchmark("run")
    options = ["--quick", "--device", "cpu", "--threads", "1", "--implementation", "unheard-of"]
    assert run.main([*options, "--out", str(tmp_path)]) == 1
    assert "unheard-of" in capsys.readouterr().out


@pytest.mark.parametrize("mix", ["unlabelled", "classes10", "classes1000", "realistic", "infonce"])
def test_rows_are_twins_in_two_views(benchmark, mix):
    inputs = benchmark("inputs")
    rows = inputs.make_rows(mix, 1001, 16, torch.float32, CPU)
    assert torch.equal(rows.identity[:500], rows.identity[500:1000]) and rows.identity[1000] == -1
    assert torch.equal(rows.candidate_set[:500], rows.candidate_set[500:1000])
    assert rows.set_table.any(1).all() and rows.candidate_set.max() < len(rows.set_table)
    torch.testing.assert_close(rows.embeddings.norm(dim=1), torch.ones(1001))


def test_the_realistic_mix_is_mostly_unlabelled(benchmark):
    inputs = benchmark("inputs")
    mix = inputs.MIXES["realistic"]
    assert len(mix.set_table) == len(mix.probability) == 14
    assert sum(mix.probability) == pytest.approx(1)
    rows = inputs.make_rows("realistic", 20_000, 8, torch.float32, CPU)
    assert rows.set_table[rows.candidate_set].all(1).float().mean() == pytest.approx(0.6, abs=0.02)


def gpu_records(**changes) -> list[dict]:
    """What a run on a GPU finds where it meets every bar."""
    found = {"both_ms": 5.0, "share": 0.7, "ratio": 1.05, "dense": 12.0, "chunked": 2.0, "memory": 3.0, "error": 2e-3}
    found |= {"largest": 1_048_576} | changes
    point = {"rows": 65_536, "width": 128, "dtype": "bf16"}
    laps = {f"{lap}_ms": [found["both_ms"]] * 3 for lap in ("forward", "backward", "both")}
    rates = {"teraflops": 600.0, "share": [found["share"]] * 3, "extra_memory_multiple": found["memory"]}
    timing = {"kind": "timing", "mix": "realistic", **laps, **rates}
    baseline = {"kind": "baseline", "mix": "realistic", "theirs_ms": [1.0] * 3, "ours_ms": [1.0] * 3}
    baseline |= {"gradient_error": 0.01, "extra_memory_multiple": 100.0}
    gate = {"case": "converged", "mass": 0.99, "loss_error": 0.0, "same_bits": True, "passed": True}
    return [
        {"kind": "machine", "device": "a GPU", "torch": "2", "triton": "3", "python": "3", "implementation": "triton"}
        | {"date": "today"},
        {"kind": "gate", **point, **gate, "gradient_error": found["error"]},
        timing | point,
        timing | point | {"rows": found["largest"]},
        {"kind": "masking", **point, "ratio": [found["ratio"]] * 3},
        baseline | point | {"name": "dense compiled", "family": "dense", "speedup": [found["dense"]] * 3},
        baseline | point | {"name": "chunked compiled", "family": "chunked", "speedup": [found["chunked"]] * 3},
        {"kind": "skipped", "what": "block at N 1,048,576, D 128", "why": "does not fit"},
    ]


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"both_ms": 6.0}, ["stretch"]),
        ({"both_ms": 7.0}, ["6.4 ms", "stretch"]),
        ({"share": 0.6}, ["65 %"]),
        ({"ratio": 1.2}, ["masking"]),
        ({"dense": 9.0}, ["dense and inf-cl"]),
        ({"chunked": 1.5}, ["chunked"]),
        ({"memory": 5.0}, ["memory"]),
        ({"largest": 524_288}, ["1,048,576"]),
        ({"error": 6e-3}, ["gradient"]),
    ],
)
def test_bars_of_a_gpu(benchmark, tmp_path, change, missed):
    report = benchmark("report")
    journal = report.Journal(tmp_path)
    for record in gpu_records(**change):
        journal.add(**record)
    bars = report.bars(journal, "cuda")
    assert len(bars) == 9
    names = [bar.name for bar in bars if not bar.met]
    assert len(names) == len(missed) and all(word in name for word, name in zip(missed, names, strict=True))
    assert report.summary(journal, "cuda").count("MISSED") == len(missed)


def test_bars_without_their_measurements_are_not_measured(benchmark, tmp_path):
    report = benchmark("report")
    journal = report.Journal(tmp_path)
    for device_type in ("cuda", "cpu"):
        assert {bar.verdict for bar in report.bars(journal, device_type)} == {"not measured"}
