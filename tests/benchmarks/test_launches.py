"""What counts as a launch and as a wait, and that no stage of a training step has come to make more of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "launches"


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark's command as a module, and its sibling `count`."""
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("launches_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("count", None)


@pytest.fixture
def counted(benchmark):
    """Launches and waits of a program, given two tensors: 0 … 5 as (2, 3) float32, and which of them are above 2."""

    def count(program):
        x = torch.arange(6.0).view(2, 3)
        above = x > 2
        with benchmark.LaunchCounter() as counter:
            program(x, above)
        return counter.total()[:2]

    return count


@pytest.mark.parametrize(
    ("program", "launches"),
    [
        (lambda x, _: x.view(3, 2).transpose(0, 1)[1:].unsqueeze(0).expand(4, 1, 3).detach().unbind(0), 0),
        (lambda x, _: (torch.empty(3), x.new_empty(2), torch.empty_like(x), x.clone().unsqueeze_(0)), 1),
        (lambda x, _: x * 2 + 1, 2),
        (lambda x, _: x.T.reshape(6), 1),  # a copy, as the order changes
        (lambda x, _: torch.where(x > 0, x, 0.0), 2),  # the 0 stays on the host
        (lambda x, _: torch.linalg.vecdot(x, x), 2),  # composite: a product and a sum
        (lambda x, _: torch._foreach_add([x, x, x], 1), 1),
        (lambda x, _: x.requires_grad_().sum().backward(), 3),  # a sum, a one, and a copy of it for each element
        (lambda x, _: x.to("meta", non_blocking=True), 1),
    ],
)
def test_launches_are_operators_that_start_kernels(counted, program, launches):
    assert counted(program) == (launches, 0)


@pytest.mark.parametrize(
    ("program", "counts"),
    [
        (lambda x, _: x.sum().item(), (1, 1)),
        (lambda x, _: bool(x.any()), (1, 1)),
        (lambda _, above: above.nonzero(), (1, 1)),
        (lambda x, above: x[above], (1, 1)),
        (lambda x, _: x[:, torch.arange(2)], (2, 0)),
        (lambda x, above: x.masked_fill(above, 0.0), (1, 0)),
        (lambda x, _: torch.unique(x), (1, 1)),
        (lambda x, _: torch.bincount(x.long().flatten()), (2, 1)),
        (lambda x, _: torch.linalg.inv_ex(x[:, :2]), (1, 0)),
        (lambda x, _: torch.linalg.inv(x[:, :2]), (1, 1)),
        (lambda x, _: torch.repeat_interleave(x.long()[0], output_size=3), (2, 0)),
        (lambda x, _: torch.repeat_interleave(x.long()[0]), (2, 1)),
        (lambda x, _: x * x.new_tensor([1, 2, 3]), (1, 1)),
        (lambda x, _: x + torch.tensor(1.0), (1, 1)),
        (lambda x, _: x.new_full((), 1.0), (1, 0)),
        (lambda x, _: x.to("meta"), (1, 1)),
    ],
)
def test_waits_are_what_stops_the_host(counted, program, counts):
    assert counted(program) == counts


@triton.jit
def _twice(x, COUNT: tl.constexpr):
    place = x + tl.arange(0, COUNT)
    tl.store(place, 2 * tl.load(place))


@torch.library.custom_op("mixcl_dist::counted_in_a_test", mutates_args=())
def _operator(x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cpu":
        return x + x + x + x
    result = x * 1
    for _ in range(2):
        _twice[(1,)](result, COUNT=4)
    return result


def test_an_operator_of_the_project_counts_as_on_a_gpu_and_computes_as_here(benchmark):
    ones = torch.ones(4)
    with benchmark.LaunchCounter() as counter:
        result = _operator(ones)
    assert counter.total() == (3, 0, 16) and counter.launches["", "triton"] == 2
    torch.testing.assert_close(result, torch.full((4,), 4.0))


def test_stages_are_counted_apart(benchmark):
    x = torch.ones(3)
    with benchmark.LaunchCounter() as counter, counter.stage("outer"):
        x.add(1)
        with counter.stage("inner"):
            x.add(1).add(1).sum().item()
        x.add(1)
    x.add(1)
    assert counter.total("outer") == (2, 0, 24) and counter.total("inner") == (3, 1, 28)
    assert counter.total() == (5, 1, 52)


@pytest.mark.parametrize(
    ("program", "taken"),
    [
        (lambda x: x.mul_(2).view(5, 2).T[1:], 0),  # in place, then views
        (lambda x: torch.empty(7), 28),
        (lambda x: x + 1, 40),
        (lambda x: x.T.reshape(10), 40),  # a copy
        (lambda x: x.view(2, 5).sort(), 40 + 80),  # values, and where they were
        (lambda x: torch.nn.functional.softmax(x * 2, dim=-1).sum(), 40 + 40 + 4),
    ],
)
def test_memory_counts_where_it_is_newly_taken(benchmark, program, taken):
    x = torch.ones(2, 5)
    with benchmark.LaunchCounter() as counter:
        program(x)
    assert counter.total().bytes == taken


def test_a_stage_that_makes_more_is_named(benchmark):
    counts = list(benchmark.read_committed().values())
    assert benchmark.grown(counts) == []
    for what in ("launches", "waits", "bytes"):
        worse = counts[3]._replace(**{what: getattr(counts[3], what) + 1})
        assert benchmark.grown([*counts[:3], worse, *counts[4:]]) == [worse]


def test_a_step_that_is_measured_waits_for_nothing_either(benchmark, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmark.SETTINGS, "pretrain.gradient_norms_every", str(benchmark.COUNTED_STEP))
    counter = benchmark.count(tmp_path)
    launches, waits, _ = counter.total(benchmark.BOOKKEEPING)
    assert launches > benchmark.read_committed()[benchmark.BOOKKEEPING].launches and waits == 0


@pytest.mark.parametrize(("launches", "waits", "said"), [(600, 0, "met"), (601, 0, "MISSED"), (600, 1, "MISSED")])
def test_bars_are_met_or_missed(benchmark, launches, waits, said):
    count = benchmark.Count("pre-training step", launches, waits, 0, 2090, 21)
    assert benchmark.verdict(count).startswith(said)
