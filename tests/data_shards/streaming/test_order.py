"""Order: every sample once an epoch, the same slot → sample for ever, quotas held exactly in every batch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixcl_dist.data_shards.streaming.order import WINDOW_SHARDS, Deck, Order

shard_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=80)


def deck_of(sizes: list[int], key: str = "k", **settings) -> Deck:
    first = np.concatenate([[0], np.cumsum(sizes)])
    return Deck(settings.pop("samples", np.arange(first[-1])), first, key, **settings)


@given(shard_sizes, st.integers(0, 5))
def test_every_epoch_holds_every_sample_once(sizes, epoch):
    deck = deck_of(sizes)
    drawn = deck.draw(epoch * len(deck), len(deck))
    assert sorted(drawn) == list(range(sum(sizes)))


@given(shard_sizes, st.integers(0, 500), st.integers(0, 60))
def test_a_draw_does_not_depend_on_what_was_drawn_before(sizes, first, count):
    whole = deck_of(sizes).draw(0, first + count)
    np.testing.assert_array_equal(deck_of(sizes).draw(first, count), whole[first:])


@given(st.integers(0, 2**32), st.data())
def test_only_the_chosen_samples_come(seed, data):
    sizes = data.draw(shard_sizes)
    chosen = data.draw(st.sets(st.integers(0, sum(sizes) - 1), min_size=1))
    deck = deck_of(sizes, str(seed), samples=np.array(sorted(chosen)))
    assert len(deck) == len(chosen)
    assert sorted(deck.draw(2 * len(deck), len(deck))) == sorted(chosen)


def test_epochs_and_keys_give_different_orders():
    deck, other = deck_of([10] * 40), deck_of([10] * 40, "other")
    orders = [deck.draw(0, 400), deck.draw(400, 400), other.draw(0, 400)]
    assert len({order.tobytes() for order in orders}) == 3


def test_the_order_is_this_one_for_ever():
    """Runs must go on under later versions: these numbers may not change."""
    assert deck_of([3, 4, 5]).draw(0, 14).tolist() == [2, 1, 4, 11, 0, 10, 8, 5, 9, 7, 3, 6, 0, 4]


def test_neighbouring_draws_touch_few_shards_at_a_time():
    deck = deck_of([10] * 500)
    for first in range(0, 4800, WINDOW_SHARDS * 10):
        assert len(np.unique(deck.draw(first, WINDOW_SHARDS * 10) // 10)) <= WINDOW_SHARDS


def test_the_order_is_well_mixed():
    """Over many epochs each sample is equally often in each quarter of the epoch, and neighbours change."""
    deck = deck_of([10] * 64)
    place = np.array([np.argsort(deck.draw(epoch * 640, 640)) for epoch in range(200)])
    quarter = np.stack([(place // 160 == q).mean(0) for q in range(4)])
    assert abs(quarter - 0.25).max() < 0.15  # 5 standard deviations of 200 draws
    pairs = Counter(frozenset(pair) for epoch in range(20) for pair in _pairs(deck.draw(epoch * 640, 640)))
    assert max(pairs.values()) <= 4


def _pairs(order: np.ndarray) -> zip:
    return zip(order.tolist(), order[1:].tolist(), strict=False)


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.5, 3.0])
def test_upsampled_samples_come_that_often_and_in_time_all_equally(factor):
    copies = np.where(np.arange(120) < 40, factor, 1.0)
    deck = deck_of([10] * 12, copies=copies)
    assert len(deck) == 80 + round(40 * factor)
    for epoch in range(4):
        times = Counter(deck.draw(epoch * len(deck), len(deck)).tolist())
        assert all(times[sample] == 1 for sample in range(40, 120))
        assert all(int(factor) <= times[sample] <= -int(-factor // 1) for sample in range(40))
    times = Counter(deck.draw(0, 4 * len(deck)).tolist())
    assert {times[sample] for sample in range(40)} == {4 * factor}


def half_labelled(batch_size: int, quota: int) -> Order:
    """Of 40 samples those from 20 on are labelled."""
    rest, labelled = (deck_of([8] * 5, samples=np.arange(first, first + 20)) for first in (0, 20))
    return Order(rest, batch_size, seed=0, labelled=[labelled], labelled_per_batch=quota)


@given(st.integers(1, 16), st.data())
def test_labelled_slots_fill_every_batch_exactly(batch_size, data):
    quota = data.draw(st.integers(0, batch_size))
    order = half_labelled(batch_size, quota)
    for step in range(4):
        assert (order.draw(step * batch_size, batch_size) >= 20).sum() == quota


def test_labelled_and_other_samples_each_keep_their_own_epochs():
    order = half_labelled(batch_size=4, quota=1)
    drawn = order.draw(0, 80)
    assert sorted(drawn[drawn >= 20]) == list(range(20, 40))
    assert set(Counter(drawn[drawn < 20].tolist()).values()) == {3}


def test_a_share_of_a_batch_has_its_share_of_labelled_slots():
    """Ranks take successive slots, so none of them may get all the labels."""
    order = half_labelled(batch_size=16, quota=4)
    for rank in range(4):
        assert (order.draw(4 * rank, 4) >= 20).sum() == 1


def test_decks_of_classes_take_turns():
    classes = [deck_of([8] * 5, samples=np.arange(c, 40, 4)) for c in range(3)]
    order = Order(
        deck_of([8] * 5, samples=np.arange(3, 40, 4)), batch_size=8, seed=0, labelled=classes, labelled_per_batch=4
    )
    drawn = order.draw(0, 8 * 60) % 4
    labelled = drawn[drawn < 3]
    for turn in range(0, len(labelled), 3):
        assert sorted(labelled[turn : turn + 3]) == [0, 1, 2]
    assert len({tuple(labelled[turn : turn + 3]) for turn in range(0, len(labelled), 3)}) == 6


@given(st.integers(0, 200), st.integers(0, 40))
def test_slots_of_a_mixture_do_not_depend_on_what_was_drawn_before(first, count):
    def order() -> Order:
        labelled = [deck_of([8] * 5, samples=np.arange(20, 30)), deck_of([8] * 5, samples=np.arange(25, 40))]
        return Order(deck_of([8] * 5, samples=np.arange(20)), 6, seed=3, labelled=labelled, labelled_per_batch=2)

    np.testing.assert_array_equal(order().draw(first, count), order().draw(0, first + count)[first:])


def test_a_replacement_comes_from_the_same_deck_and_depends_on_slot_and_attempt():
    labelled = deck_of([8] * 50, samples=np.arange(200, 400))
    order = Order(deck_of([8] * 50, samples=np.arange(200)), 4, seed=0, labelled=[labelled], labelled_per_batch=2)
    for slot in range(8):
        kind = order.draw(slot, 1)[0] >= 200
        picks = [order.replacement(slot, attempt) for attempt in range(1, 9)]
        assert all((pick >= 200) == kind for pick in picks) and len(set(picks)) > 4
        assert picks == [order.replacement(slot, attempt) for attempt in range(1, 9)]
