"""The model of a step at many ranks agrees with what can be said of it without it."""

from __future__ import annotations

import dataclasses

import pytest

from mixcl_dist.profiling import scaling


@pytest.fixture(scope="module")
def costs():
    return scaling.Costs(0.1, 1e-9, 2e-9, 1_000_000, 64, 4, 1e5, 4)


@pytest.fixture(scope="module")
def network():
    return scaling.Network("some", 8, 1e10, 1e9, 1e-6, 1e-5, storage=1e9)


def step(costs, network, **changed):
    return scaling.predict(costs, network, **({"ranks": 8, "rows": 1000, "stage": 1, "contrast": "gather"} | changed))


def test_one_rank_exchanges_nothing(costs, network):
    alone = step(costs, network, ranks=1)
    assert alone.embeddings == alone.integers == alone.gradients == alone.words == 0
    assert alone.seconds == pytest.approx(0.1 + 1000**2 * 1e-9)


def test_the_parts_by_hand(costs, network):
    """Eight ranks in a node: each receives seven blocks of 256 kB twice and sends 7/8 of 4 MB of gradients twice."""
    free = dataclasses.replace(network, inside_latency_s=0, between_latency_s=0)
    found = step(costs, free)
    assert found.sweeps == pytest.approx(1e-3 + 7 * 2e-3)
    assert found.embeddings == pytest.approx(2 * 7 * 256_000 / 1e10)
    assert found.gradients == pytest.approx(2 * 7 / 8 * 4e6 / 1e10)
    assert step(costs, free, stage=3).gradients == pytest.approx(1.5 * found.gradients)
    assert found.reading == pytest.approx(8 * 4 * 1e5 / 1e9)


def test_a_ring_costs_what_the_sweeps_do_not_hide(costs, network):
    hidden = step(costs, network, contrast="ring")
    assert hidden.embeddings == 0, "26 µs for a block, and 500 µs for its sweep"
    quick = dataclasses.replace(costs, own_pair_s=0, other_pair_s=0)
    bare = step(quick, network, contrast="ring")
    assert bare.embeddings == pytest.approx(2 * 7 * (256_000 / 1e10 + 1e-6))


def test_rows_of_a_rank_by_itself_cost_the_same_at_any_number_of_ranks(costs, network):
    few, many = (step(costs, network, contrast="rank", ranks=ranks) for ranks in (2, 512))
    assert few.sweeps == many.sweeps and many.embeddings == many.integers == 0


@pytest.mark.parametrize("contrast", ["gather", "ring", "rank"])
def test_more_ranks_are_never_more_efficient(costs, network, contrast):
    shares = [
        scaling.efficiency(costs, network, ranks=2**power, rows=4096, stage=2, contrast=contrast) for power in range(11)
    ]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True)


def test_the_limit_is_the_part_that_was_made_slow(costs, network):
    slow = {
        "sweeps": (dataclasses.replace(costs, other_pair_s=1e-6), network),
        "gradients": (dataclasses.replace(costs, parameters=10**10), network),
        "reading": (costs, dataclasses.replace(network, storage=1e6)),
        "words": (costs, dataclasses.replace(network, inside_latency_s=0.01)),
    }
    for part, (of, over) in slow.items():
        assert step(of, over, contrast="ring").limit == part


def test_the_most_ranks_are_the_last_that_are_efficient_enough(costs, network):
    design = {"rows": 4096, "stage": 1, "contrast": "gather"}
    most = scaling.most_ranks(costs, network, least=0.5, **design)
    assert scaling.efficiency(costs, network, ranks=most, **design) >= 0.5
    assert scaling.efficiency(costs, network, ranks=2 * most, **design) < 0.5
