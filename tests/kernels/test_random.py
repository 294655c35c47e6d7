"""Counter-based random numbers: Philox as published, the same on every device."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from mixcl_dist.kernels.random import random

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS = torch.tensor([3, 0, 2**40])


def philox(key: list[int], counter: list[int]) -> list[int]:
    """Philox-4x64-10 as Salmon et al. (2011) define it, one block in Python's integers."""
    (a, b, c, d), (k, m), word = counter, key, 2**64
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = right // word ^ b ^ k, right % word, left // word ^ d ^ m, left % word
        k, m = (k + 0x9E3779B97F4A7C15) % word, (m + 0xBB67AE8584CAA73B) % word
    return [a, b, c, d]


def kernel(*arguments) -> torch.Tensor:
    from mixcl_dist.kernels.philox import fill

    slot, *rest = arguments
    return fill(slot.to(DEVICE), *rest).cpu()


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ([0] * 2, [0] * 4, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        ([2**64 - 1] * 2, [2**64 - 1] * 4, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    ],
)
def test_the_definition_below_gives_the_published_answers(key, counter, expected):
    """Known answers of Random123, the authors' own library."""
    assert philox(key, counter) == [int(word, 16) for word in expected.split()]


@pytest.mark.parametrize("draw_of", [random, kernel], ids=["numpy", "triton"])
def test_uniform_numbers_are_philox_to_the_bit(draw_of):
    seed, draw, parts, count = 2**33 + 7, 5, 2, 19
    got = draw_of(SLOTS, seed, draw, parts, count, False, torch.float32)
    for row, (part, slot) in enumerate((part, slot) for part in range(parts) for slot in SLOTS.tolist()):
        words = [word for block in (1, 2, 3) for word in philox([seed, 0], [block, draw, slot, part])]
        halves = [half for word in words for half in (word % 2**32, word >> 32)]
        assert got[row].tolist() == [(half >> 8 | 1) / 2**24 for half in halves[:count]]


@pytest.mark.parametrize("count", [0, 1, 8, 1025])
@pytest.mark.parametrize("normal", [False, True], ids=["uniform", "normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_gives_what_a_cpu_gives(normal, count, dtype):
    got, expected = (draw(SLOTS, 1, 0, 2, count, normal, dtype) for draw in (kernel, random))
    assert got.shape == (6, count) and got.dtype == expected.dtype == dtype
    if normal:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(got, expected)


def test_rows_differ_by_seed_draw_slot_and_part_and_by_nothing_else():
    one = random(SLOTS, 1, 0, 2, 64, False, torch.float32)
    assert len({tuple(row) for row in one.tolist()}) == 6
    assert torch.equal(random(SLOTS[2:], 1, 0, 2, 64, False, torch.float32), one[[2, 5]])
    assert torch.equal(random(SLOTS, 1, 0, 1, 10, False, torch.float32), one[:3, :10])
    for seed, draw in ((2, 0), (1, 1)):
        assert (random(SLOTS, seed, draw, 2, 64, False, torch.float32) != one).float().mean() > 0.99


def test_numbers_have_their_distributions():
    uniform, normal = (random(torch.arange(4), 0, 0, 1, 5_001, kind, torch.float32).flatten() for kind in (False, True))
    assert uniform.min() > 0 and uniform.max() < 1
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(normal.numpy(), "norm").pvalue > 0.01
    pairs = normal.view(4, -1)[:, :5_000].reshape(-1, 2).double()
    assert abs(float(np.corrcoef(pairs.T)[0, 1])) < 0.03, "both of a pair come from one word"


def test_the_operator_is_registered_soundly():
    torch.library.opcheck(random, (SLOTS, 1, 0, 2, 9, True, torch.float32))


def test_a_cpu_draws_without_triton(monkeypatch):
    for module in ("triton", "mixcl_dist.kernels.philox"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it would fail
    assert random(SLOTS, 0, 0, 1, 4, True, torch.float32).shape == (3, 4)


def test_the_kernel_builds_for_a_gpu():
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mixcl_dist.kernels.philox import philox_kernel
types = {"slot": "*i64", "out": "*fp32", "seed": "i64", "draw": "i32", "slots": "i32", "count": "i32"}
for normal in (False, True):
    constants = {"NORMAL": normal, "BLOCKS": 128}
    source = ASTSource(philox_kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"}
    )
    assert run.returncode == 0, run.stderr
