"""What is particular to the Triton kernels; the contract has the rest."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import normalize

from mixcl_dist.kernels import backward, forward, fused, index, mixed_contrastive_loss, plan, small, tuning
from mixcl_dist.kernels.batch import Batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


TABLE = torch.cat([torch.eye(3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)])


BLOCKS = {"uniform tiles": [0, 0, 1, 3, 3], "border inside a tile": [0] * 3 + [1] * 4, "all open": [3] * 4}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of 32 rows and 16 columns even in small batches, so that every kind of them occurs."""
    monkeypatch.setattr(small, "LARGEST", 0)
    for key in tuning.TILES:
        if key[0] == "interpreter":
            monkeypatch.setitem(tuning.TILES, key, {1024: tuning.Tile(32, 16, 4, 1)})


def rows(blocks: list[int], *, length: int, identity: str, d: int = 16, seed: int = 0) -> dict:
    """Rows of one candidate set after another, as many of each as `length` says."""
    candidate_set = torch.tensor(blocks).repeat_interleave(length)
    n = len(candidate_set)
    generator = torch.Generator().manual_seed(seed)
    return {
        "embeddings": normalize(torch.randn(n, d, generator=generator), dim=1),
        "identity": {"pairs": torch.arange(n) // 2, "across": torch.arange(n) % (n // 2)}[identity],
        "candidate_set": candidate_set,
        "set_table": TABLE,
    }


def loss_and_gradient(arguments: dict, implementation: str, temperature: float) -> tuple[torch.Tensor, ...]:
    device = DEVICE if implementation == "triton" else "cpu"
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    moved["embeddings"].requires_grad_()
    out = mixed_contrastive_loss(**moved, temperature=temperature, implementation=implementation)
    (gradient,) = torch.autograd.grad(out.loss, moved["embeddings"])
    return tuple(value.detach().cpu().double() for value in (out.loss, out.lse, out.label_similarity, gradient))


def double(arguments: dict) -> dict:
    return arguments | {"embeddings": arguments["embeddings"].detach().double()}


@pytest.mark.parametrize("temperature", [0.2, 0.01], ids=["narrow", "wide"])
@pytest.mark.parametrize("identity", ["pairs", "across"])
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_every_kind_of_tile(blocks, identity, temperature):
    arguments = rows(blocks, length=32, identity=identity)
    got = loss_and_gradient(arguments, "triton", temperature)
    want = loss_and_gradient(double(arguments), "reference", temperature)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["identity alone", "label alone"])
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_one_relation_alone(blocks, weights):
    arguments = rows(blocks, length=32, identity="pairs")
    arguments |= {"identity_weight": weights[0], "label_weight": weights[1]}
    got, want = loss_and_gradient(arguments, "triton", 0.2), loss_and_gradient(double(arguments), "reference", 0.2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("d", [48, 96, 160])
def test_a_width_of_two_parts(d):
    head, tail = tuning._split(d)
    assert tail and head + tail == d
    arguments = rows([0, 3], length=40, identity="pairs", d=d)
    got, want = loss_and_gradient(arguments, "triton", 0.2), loss_and_gradient(double(arguments), "reference", 0.2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "tile", [tuning.Tile(32, 32, 4, 1, step=16, out=32), tuning.Tile(32, 16, 4, 1, step=32, out=16)]
)
def test_rows_that_are_streamed_in_steps(tile, monkeypatch):
    for key in tuning.TILES:
        if key[0] == "interpreter":
            monkeypatch.setitem(tuning.TILES, key, {1024: tile})
    arguments = rows([0, 1, 3], length=32, identity="pairs", d=64)
    got, want = loss_and_gradient(arguments, "triton", 0.2), loss_and_gradient(double(arguments), "reference", 0.2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_positive_does_not_swallow_the_negatives_of_other_tiles():
    """A tile of 16 negatives adds less than half a unit in the last place of the positive's exponential."""
    embeddings = torch.zeros(512, 16)
    embeddings[:2, 0] = embeddings[2:, 1] = 1
    arguments = rows([3] * 16, length=32, identity="pairs") | {"embeddings": embeddings}
    temperature = math.log2(math.e) / 28.25  # so the positive's exponent is exact
    _, lse, *_ = loss_and_gradient(arguments, "triton", temperature)
    excess = math.log1p(510 * 2**-28.25)
    torch.testing.assert_close(lse[0, :2] - 1 / temperature, torch.full((2,), excess).double(), rtol=0.1, atol=0)


class Split:
    """One process whose rows meet the batch's in two parts, as on a ring."""

    size, own = 2, slice(None)

    def __init__(self, at: int):
        self.at = at

    def blocks(self, embeddings):
        for which in (slice(0, self.at), slice(self.at, None)):
            yield which, embeddings[which].clone()

    def gather(self, values):
        return values

    sum = gather

    def use_ring(self, embeddings):
        return True


NARROW = pytest.param(0.2, id="narrow", marks=pytest.mark.slow)


@pytest.mark.parametrize("temperature", [NARROW, pytest.param(0.005, id="wide")])
def test_columns_that_come_in_parts(temperature, monkeypatch):
    """And that lack sets between theirs: 16 columns of the first part hold the first and the last of 20 sets."""
    sets = torch.arange(320) % 20
    sets[:16] = torch.tensor([0, 19]).repeat(8)
    z = normalize(torch.randn(320, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    arguments = {"embeddings": z, "identity": torch.arange(320) // 2, "candidate_set": sets}
    arguments["set_table"] = torch.eye(20, dtype=torch.bool)
    want = loss_and_gradient(double(arguments), "reference", temperature)
    monkeypatch.setattr(Batch, "join", lambda self, process_group, sweep, **same: Split(16))
    loss, lse, _, gradient = loss_and_gradient(arguments, "triton", temperature)
    got = loss, lse, gradient / 2  # as the mean over two processes will have it
    torch.testing.assert_close(got, (want[0], want[1], want[3]), rtol=1e-4, atol=1e-5)


def test_the_compiler_makes_one_graph_for_any_number_of_rows():
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def loss(arguments: dict) -> torch.Tensor:
        return mixed_contrastive_loss(**arguments, implementation="triton").loss

    for length in (12, 20, 28, 36):
        arguments = {name: value.to(DEVICE) for name, value in rows([0, 3], length=length, identity="pairs").items()}
        torch.testing.assert_close(loss(arguments), mixed_contrastive_loss(**arguments, implementation="tiled").loss)
    assert counter.frame_count == 2  # of the first number, then of any


class Skipped:
    """Stands for a Triton kernel that is launched and does nothing."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the CPU's memory; benchmarks/kernel/run.py measures a GPU's")
def test_memory_around_the_kernels_stays_below_four_times_the_embeddings(monkeypatch):
    """What PyTorch holds beside 65,536 rows of 128 features, cut as for an H100; kernels themselves hold nothing."""
    for module in (backward, forward, fused, index, plan):
        for name in [name for name, value in vars(module).items() if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Skipped())
    monkeypatch.setattr(tuning, "architecture_of", lambda device: "sm_90")
    arguments = rows([0, 1, 2, 3], length=16384, identity="pairs", d=128)
    arguments["embeddings"] = arguments["embeddings"].half().requires_grad_()
    peaks = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = mixed_contrastive_loss(**arguments, implementation="triton").loss
    peaks.append(peak_bytes(profile))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss.backward()
    peaks.append(peak_bytes(profile))
    assert max(peaks) < 4 * 65536 * 128 * 2


def peak_bytes(profile) -> int:
    """The most that was allocated at once, beyond what was before."""
    events = sorted(
        (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    return max(itertools.accumulate(event.nbytes() for event in events))
