"""Seconds of a pre-training step on any number of ranks, from what its parts cost one rank and what the network takes.

Every rank keeps its own patches and rows (weak scaling). Its step is

    step   = max(compute + sweeps + exchange, reading)
    sweeps = n² own + n·(W − 1)·n other      rows n of a rank against the columns of all W ranks, forward and backward
    exchange = embeddings twice (gathered, or on a ring beside the sweeps) + integers + gradients + words of one number

and the efficiency is that of one rank's step over W ranks'. All functions are pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

INTEGER_BYTES = 40
"""Of a row: identity, candidate set, weight, presence and, in the backward, what the forward found."""
SMALL_CALLS = 12
"""All-reduces of one number and gathers of a few in a step: candidate sets, means of terms, norms, whether to stop."""
GRADIENT_BYTES = 4
"""Of a parameter: float32, as the engine reduces them."""
VOLUMES = {0: 2, 1: 2, 2: 2, 3: 3}
"""Times that ZeRO sends a rank's share of all parameters: reduce and gather, at stage 3 gathered twice."""

CURES = {
    "sweeps": "every row meets every other row, so that a rank's work grows with their number; objective.contrast "
    "rank, each rank's own rows alone, keeps it constant",
    "embeddings": "all embeddings reach every rank; the ring hides this behind the sweeps where those take longer, "
    "8-bit embeddings would halve it",
    "integers": "identities and sets of all rows reach every rank; 8 bytes a row would do",
    "gradients": "all gradients cross the network in float32, after the backward; engine.communication_dtype bfloat16 "
    "halves it, sending them beside the backward would hide it, and engine.accumulation_steps divides it",
    "words": "many small collectives wait for the farthest rank; fewer would do",
    "reading": "the store of the shards is at its end; data.cache on local disks after the first epoch, or a faster "
    "store",
}
"""Part of a step → what lifts it."""

Contrast = Literal["gather", "ring", "rank"]


@dataclass(frozen=True)
class Costs:
    """What a step costs a rank by itself."""

    compute_s: float
    """Views, network, heads and optimizer: all that does not grow with the number of rows or ranks."""
    own_pair_s: float
    """A pair of the rank's own rows in the loss, forward and backward: of two that are alike one is computed."""
    other_pair_s: float
    """A row of the rank with a column of another."""
    parameters: int
    width: int
    """Features of a row."""
    element_bytes: int
    """Of a row's feature: 2 on a GPU, 4 on a CPU."""
    sample_bytes: float
    """Of a patch as it is stored."""
    patches: int
    """Of a rank in a step."""


@dataclass(frozen=True)
class Network:
    """What lies between ranks. Rates are of one rank in each direction while all send, in bytes a second."""

    name: str
    ranks_per_node: int
    inside: float
    between: float
    inside_latency_s: float
    between_latency_s: float
    storage: float
    """Bytes a second that the store of the shards gives all ranks together."""

    def rate(self, ranks: int) -> float:
        return self.inside if ranks <= self.ranks_per_node else self.between

    def hop_s(self, ranks: int) -> float:
        return self.inside_latency_s if ranks <= self.ranks_per_node else self.between_latency_s


class Step(NamedTuple):
    """Seconds of a step, by part."""

    compute: float
    sweeps: float
    embeddings: float
    integers: float
    gradients: float
    words: float
    reading: float
    """Beside all others, so that it counts only where it takes longer."""

    @property
    def seconds(self) -> float:
        return max(sum(self) - self.reading, self.reading)

    @property
    def limit(self) -> str:
        """The part that costs most beside computing."""
        others = self._asdict() | {"reading": max(0.0, self.reading - (sum(self) - self.reading))}
        del others["compute"]
        return max(others, key=lambda part: others[part])


def predict(
    costs: Costs, network: Network, *, ranks: int, rows: int, stage: int, contrast: Contrast, passes: int = 1
) -> Step:
    """A step of `ranks` ranks of `rows` rows each, at a ZeRO stage, with embeddings gathered or on a ring, or
    (`rank`) never sent, as `objective.contrast` rank has it; rows are met once in each of its backward `passes`."""
    own, other = rows**2 * costs.own_pair_s, rows**2 * costs.other_pair_s
    block, seen = _block(costs, rows), _seen(ranks, contrast)
    sweeps = own + (seen - 1) * other
    if contrast == "ring":  # a block arrives while the one before it is being swept
        hop = block / network.rate(ranks) + network.hop_s(ranks)
        embeddings = (ranks > 1) * 2 * (max(0.0, hop - own / 2) + (ranks - 2) * max(0.0, hop - other / 2))
    else:
        embeddings = 2 * all_gather_s(block, seen, network)
    shares = (ranks - 1) / ranks * costs.parameters * GRADIENT_BYTES / network.rate(ranks)
    return Step(
        compute=costs.compute_s,
        sweeps=passes * sweeps,
        embeddings=passes * embeddings,
        integers=passes * 2 * all_gather_s(rows * INTEGER_BYTES, seen, network),
        gradients=VOLUMES[stage] * (shares + network.hop_s(ranks) * (ranks > 1) * math.log2(max(ranks, 2))),
        words=SMALL_CALLS * network.hop_s(ranks) * math.ceil(math.log2(ranks)),
        reading=ranks * costs.patches * costs.sample_bytes / network.storage,
    )


def received_bytes(costs: Costs, *, ranks: int, rows: int, stage: int, contrast: Contrast, passes: int = 1) -> float:
    """What a rank gets from the others in such a step: embeddings and integers of their rows, and gradients."""
    of_rows = 2 * (_seen(ranks, contrast) - 1) * (_block(costs, rows) + rows * INTEGER_BYTES)
    return passes * of_rows + VOLUMES[stage] * (ranks - 1) / ranks * costs.parameters * GRADIENT_BYTES


def _block(costs: Costs, rows: int) -> float:
    """Bytes of a rank's embeddings."""
    return rows * costs.width * costs.element_bytes


def _seen(ranks: int, contrast: Contrast) -> int:
    """Ranks whose rows a rank meets."""
    return 1 if contrast == "rank" else ranks


def all_gather_s(block: float, ranks: int, network: Network) -> float:
    """Seconds until every rank has the block, in bytes, of every other, round a ring of nodes."""
    if ranks == 1:
        return 0.0
    hops = min(ranks, network.ranks_per_node) - 1
    latency = (
        hops * network.inside_latency_s + (math.ceil(ranks / network.ranks_per_node) - 1) * network.between_latency_s
    )
    return (ranks - 1) * block / network.rate(ranks) + latency


def efficiency(costs: Costs, network: Network, *, ranks: int, rows: int, stage: int, contrast: Contrast) -> float:
    """Samples a second of a rank among `ranks`, as a share of those of one by itself; reading from the same store."""
    alone = predict(costs, network, ranks=1, rows=rows, stage=0, contrast=contrast)
    return alone.seconds / predict(costs, network, ranks=ranks, rows=rows, stage=stage, contrast=contrast).seconds


def most_ranks(costs: Costs, network: Network, *, rows: int, stage: int, contrast: Contrast, least: float) -> int:
    """The largest power of two up to 65,536 at which the efficiency is `least` or more."""
    ranks = 1
    while (
        ranks < 2**16
        and efficiency(costs, network, ranks=2 * ranks, rows=rows, stage=stage, contrast=contrast) >= least
    ):
        ranks *= 2
    return ranks
