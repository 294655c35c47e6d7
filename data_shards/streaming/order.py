"""Slot of a run → sample: a pure function without I/O, so any number of ranks and workers can take a run up anywhere.

Slots are numbered from 0 over the whole run: step s of a global batch of B samples holds the slots s·B … s·B + B - 1.
Samples are numbered in the order of the manifest's shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

WINDOW_SHARDS = 32
"""Shards whose samples are shuffled together: what a worker's indices, or a cache on disk, must hold at a time. The
shards are shuffled among each other and were written in a random order, so more would not mix better."""


class Deck:
    """Samples in an endless sequence: epoch after epoch, each of them `len(deck)` draws, in a new order.

    An epoch shuffles the shards, then the samples of every `WINDOW_SHARDS` successive ones.

    `samples` are ascending numbers, `first_of_shard` (S + 1,) the number of each shard's first sample and, last, of
    all samples. `copies` says how often a sample comes in an epoch, on average over epochs: a sample of 1.5 comes
    once or twice, and twice in every other epoch.
    """

    def __init__(
        self, samples: np.ndarray, first_of_shard: np.ndarray, key: str, copies: np.ndarray | None = None
    ) -> None:
        self.samples = samples
        self._first_of_shard = first_of_shard.astype(samples.dtype)  # NumPy would copy all samples to compare them
        self._key = key
        self._parts = [(samples, 1, 0)] if copies is None else list(_parts(samples, copies))
        self._epoch_size = sum(len(part) * whole + extra for part, whole, extra in self._parts)
        # The sequence moves on steadily, so the last epoch and window are all that is worth keeping.
        self._layout = lru_cache(maxsize=2)(self._lay_out)
        self._window = lru_cache(maxsize=2)(self._shuffle_window)

    def __len__(self) -> int:
        return self._epoch_size

    def draw(self, first: int, count: int) -> np.ndarray:
        """Draws `first` … `first + count - 1` of the sequence, (count,) int64."""
        drawn: list[np.ndarray] = []
        while count > 0:
            epoch, place = divmod(first, len(self))
            ends = self._layout(epoch)[2]
            window = int(np.searchsorted(ends, place, side="right"))
            begin = int(ends[window - 1]) if window else 0
            run = self._window(epoch, window)[place - begin :][:count]
            drawn.append(run)
            first, count = first + len(run), count - len(run)
        return np.concatenate(drawn) if drawn else np.zeros(0, dtype=np.int64)

    def pick(self, *words: int) -> int:
        """A sample that depends on `words` alone."""
        return int(self.samples[_random(self._key, "pick", *words).randint(len(self.samples))])

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The epoch's samples, ascending; the order of its shards; the epoch's draws up to the end of each window."""
        members = self._members(epoch)
        order = _random(self._key, "shards", epoch).permutation(len(self._first_of_shard) - 1)
        counts = np.diff(np.searchsorted(members, self._first_of_shard))[order]
        return members, order, np.add.reduceat(counts, np.arange(0, len(counts), WINDOW_SHARDS)).cumsum()

    def _members(self, epoch: int) -> np.ndarray:
        if len(self._parts) == 1 and self._parts[0][1:] == (1, 0):
            return self.samples
        chosen = []
        for number, (part, whole, extra) in enumerate(self._parts):
            chosen += [part] * whole
            # The extra ones go around, so that in time all come equally often.
            for turn, begin, end in _turns(epoch * extra, extra, len(part)):
                chosen.append(part[_random(self._key, "extra", number, turn).permutation(len(part))[begin:end]])
        return np.sort(np.concatenate(chosen))

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        members, order, _ = self._layout(epoch)
        shards = order[window * WINDOW_SHARDS : (window + 1) * WINDOW_SHARDS]
        begins, ends = (np.searchsorted(members, self._first_of_shard[shards + one]) for one in (0, 1))
        held = np.concatenate([members[begin:end] for begin, end in zip(begins, ends, strict=True)])
        return held[_random(self._key, "window", epoch, window).permutation(len(held))].astype(np.int64)


class Order:
    """Which sample each slot of a run shows.

    Without `labelled` every slot draws from `samples`. With it, `labelled_per_batch` of each batch's `batch_size`
    slots, spread evenly, draw from `labelled` instead: from each of these decks in turn, in a new order every round
    (one deck for each class makes the draw class-aware).
    """

    def __init__(
        self, samples: Deck, batch_size: int, seed: int, labelled: Sequence[Deck] = (), labelled_per_batch: int = 0
    ) -> None:
        assert 0 <= labelled_per_batch <= batch_size and (labelled or not labelled_per_batch)
        self._samples, self._labelled = samples, labelled
        self._batch_size, self._seed = batch_size, seed
        self._labelled_per_batch = labelled_per_batch

    @property
    def epoch_size(self) -> int:
        """Slots in which `samples` has gone round once (where all slots are labelled ones: all of `labelled`)."""
        others = self._batch_size - self._labelled_per_batch
        if not others:
            return sum(map(len, self._labelled))
        return -(-len(self._samples) * self._batch_size // others)

    def draw(self, first: int, count: int) -> np.ndarray:
        """The samples of slots `first` … `first + count - 1`, (count,) int64."""
        if not self._labelled_per_batch:
            return self._samples.draw(first, count)
        return np.array([deck.draw(number, 1)[0] for deck, number in self._places(first, count)], dtype=np.int64)

    def replacement(self, slot: int, attempt: int) -> int:
        """The sample that stands in for that of `slot` when it and the first `attempt - 1` replacements are bad."""
        ((deck, _),) = self._places(slot, 1)
        return deck.pick(slot, attempt)

    def _places(self, first: int, count: int) -> Iterator[tuple[Deck, int]]:
        """The deck of each slot and the number of the draw in it."""
        size, quota = self._batch_size, self._labelled_per_batch
        for slot in range(first, first + count):
            step, place = divmod(slot, size)
            before = place * quota // size  # labelled slots before this one in its batch
            if (place + 1) * quota // size > before:
                turn, deck = divmod(step * quota + before, len(self._labelled))
                order = _random(str(self._seed), "class", turn).permutation(len(self._labelled))
                yield self._labelled[order[deck]], turn
            else:
                yield self._samples, step * (size - quota) + place - before


def _parts(samples: np.ndarray, copies: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
    """Samples of one number of copies, how often all of them come, and how many of them once more."""
    for value in np.unique(copies):
        part = samples[copies == value]
        whole = int(value)
        yield part, whole, round((float(value) - whole) * len(part))


def _turns(first: int, count: int, length: int) -> Iterator[tuple[int, int, int]]:
    """`count` places from `first` on of a sequence of turns of `length`: each turn with its first and end place."""
    while count > 0:
        turn, begin = divmod(first, length)
        end = min(length, begin + count)
        yield turn, begin, end
        first, count = first + end - begin, count - (end - begin)


def _random(key: str, *words: str | int) -> np.random.RandomState:
    """Random numbers of these words alone; NumPy keeps those of `RandomState` for ever (NEP 19), not `Generator`'s."""
    hashed = hashlib.blake2b(" ".join(map(str, (key, *words))).encode(), digest_size=32).digest()
    return np.random.RandomState(np.frombuffer(hashed, dtype="<u4"))
