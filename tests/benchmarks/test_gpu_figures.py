"""What the programs of the GPU queue compute from their measurements, held against figures made by hand."""

from __future__ import annotations

import pytest
import torch

from mixcl_dist.kernels import tuning


def test_overlapping_kernels_count_once_as_busy(benchmark):
    covered = benchmark("step").covered
    assert covered([(0, 2), (1, 3), (1.5, 1.75), (5, 6)]) == 4
    assert covered([]) == 0


def test_every_entry_of_the_table_is_put_to_the_gate(benchmark):
    gate = benchmark("gate")
    for architecture in ("sm_80", "sm_90", "sm_100", "interpreter"):
        put = [name.split("-") for name in gate.entry_names(architecture)]
        for (of, _, size), by_width in tuning.TILES.items():
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                if of == architecture and dtype.itemsize == size:
                    widths = [int(width) for name, width in put if name == gate.dtype_name(dtype)]
                    served = {next((most for most in by_width if width <= most), None) for width in widths}
                    assert served - {None} == set(by_width)  # a variant may serve narrow rows alone


def test_an_entrys_cases_have_every_variant(benchmark):
    cases = benchmark("gate").entry_cases("fp16-64", (33,), torch.device("cpu"))
    assert {case.name for case in cases} >= {"realistic", "every argument", "temperature 0.01", "converged"}
    assert all(case.rows.embeddings.dtype == torch.float16 and case.rows.embeddings.shape[1] == 64 for case in cases)
    assert any(case.rows.group is not None for case in cases) and any(case.mass for case in cases)


def test_a_tile_is_in_force_within_its_block_alone(benchmark, monkeypatch):
    monkeypatch.setattr(tuning, "architecture_of", lambda device: "sm_90")
    prepared, inputs = benchmark("prepared"), benchmark("inputs")
    rows = inputs.make_rows("realistic", 8, 64, torch.bfloat16, torch.device("cpu"))
    before = tuning.launch_for(rows.embeddings, "forward").tile
    other = tuning.Tile(64, 32, 8, 4)
    with prepared.in_force("forward", rows, other):
        assert tuning.launch_for(rows.embeddings, "forward").tile == other
        wider = inputs.make_rows("realistic", 8, 128, torch.bfloat16, torch.device("cpu"))
        assert tuning.launch_for(wider.embeddings, "forward").tile == before
    assert tuning.launch_for(rows.embeddings, "forward").tile == before


def test_a_sweep_proposes_an_entry_that_python_reads(benchmark, monkeypatch):
    monkeypatch.setattr(tuning, "architecture_of", lambda device: "sm_90")
    tiles, inputs = benchmark("tiles"), benchmark("inputs")
    rows = inputs.make_rows("realistic", 16, 128, torch.bfloat16, torch.device("cpu"))
    now, faster = tuning.Tile(128, 64, 8, 3), tuning.Tile(64, 64, 8, 2, step=128)
    found = tiles.report("forward", rows, now, {now: 2.0, faster: 1.0}, {})
    assert eval(f"{{{found['proposal']}\n}}", {"Tile": tuning.Tile}) == {("sm_90", "forward", 2): {128: faster}}
    assert found["teraflops"] == pytest.approx(2 * 16**2 * 128 / 1e-3 / 1e12)
    assert not tiles.report("forward", rows, now, {}, {"Tile(1)": "wrong"})["passed"]


def test_counters_are_told_kernel_by_kernel(benchmark):
    counters = benchmark("counters")
    head = "ID,Kernel Name,Section Name,Metric Name,Metric Unit,Metric Value"
    rows = [("0", "forward_kernel", "Duration", "ms", "1.5"), ("0", "forward_kernel", "DRAM Throughput", "%", "12.5")]
    rows += [("1", "backward_kernel", "Duration", "ns", "2,500"), ("1", "backward_kernel", "Registers", "", "255")]
    lines = [
        head,
        *(f'"{i}","{name}","a section","{metric}","{unit}","{value}"' for i, name, metric, unit, value in rows),
    ]
    found = counters.by_kernel([",".join(f'"{word}"' for word in head.split(",")), *lines[1:]])
    assert found["0"] == {"Kernel Name": "forward_kernel", "Duration": 1500, "DRAM Throughput": 12.5}
    assert counters.describe(found["1"]) == "duration 2.5 µs"


def test_a_tile_that_is_wrong_or_does_not_compile_is_passed_over(benchmark, monkeypatch):
    tiles, gate, inputs = map(benchmark, ("tiles", "gate", "inputs"))
    monkeypatch.setattr(tuning, "architecture_of", lambda device: "sm_90")
    rows = inputs.make_rows("realistic", 16, 128, torch.bfloat16, torch.device("cpu"))
    tile = tuning.Tile(64, 64, 8, 2)
    for passed, found in ((True, ""), (False, "wrong: gradient error 5.0e-01")):
        monkeypatch.setattr(gate, "check", lambda *_, passed=passed: {"passed": passed, "gradient_error": 0.5})
        assert tiles.objection("forward", rows, tile) == found
    monkeypatch.setattr(gate, "check", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in tiles.objection("forward", rows, tile)


@pytest.mark.parametrize("kernel", ["forward", "backward", "forward-triangle"])
def test_a_prepared_kernel_gets_what_the_call_has_handed_it_and_nothing_else_is_run(benchmark, monkeypatch, kernel):
    monkeypatch.setattr(tuning, "architecture_of", lambda device: "sm_90")
    prepared, gate, inputs = map(benchmark, ("prepared", "gate", "inputs"))
    table, _, functions = prepared.SWEEPS[kernel]
    handed, calls = [], []
    tile = tuning.Tile(128, 64, 8, 5)

    def call(rows, implementation):  # stands in for the public function
        calls.append(implementation)
        for module, name in functions:
            halved = tuning.launch_for(rows.embeddings, "forward").tile.triangle
            getattr(module, name)(name, tuning.launch_for(rows.embeddings, table).tile, halved)

    for module, name in functions:
        monkeypatch.setattr(module, name, lambda *arguments: handed.append(arguments))
    monkeypatch.setattr(gate, "evaluate", call)
    rows = inputs.make_rows("realistic", 8, 64, torch.bfloat16, torch.device("cpu"))
    launch = prepared.prepared(kernel, rows, tile)
    launch()
    expected = [(name, tile, kernel == "forward-triangle") for _, name in functions]
    assert calls == ["triton"] and handed == expected * 2
    assert tuning.launch_for(rows.embeddings, table).tile != tile


def test_every_planned_step_has_settings_that_the_product_takes(benchmark):
    step, stages = map(benchmark, ("step", "stages"))
    for tiny, names in ((False, stages.STEPS), (True, stages.TINY_STEPS)):
        for name in names:
            edge, _, variant = name.partition("-")
            config = step.settings(int(edge), variant, 100, tiny)
            assert config.views.size == (int(edge),) * 3 and config.engine.compile == (variant == "compile")
            assert tiny or 2 * config.pretrain.batch_size * config.rows.per_view_pair == 8192
