"""Rows to measure with: embeddings as a half-trained network gives them, under several mixes of labels.

Legend: N rows of width D, of P = N // 2 points, each seen in two views (rows p and P + p), S candidate sets, C classes.
An odd N leaves the last row without a twin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

TEMPERATURE = 0.1
ORGANS = 8


@dataclass(frozen=True)
class Rows:
    """The arguments of ``mixed_contrastive_loss``."""

    embeddings: Tensor  #: (N, D) floating, of length 1 before they were rounded to their dtype
    identity: Tensor  #: (N,) int64
    candidate_set: Tensor  #: (N,) int64
    set_table: Tensor  #: (S, C) bool
    temperature: float | Tensor = TEMPERATURE
    identity_weight: float = 1.0
    label_weight: float = 1.0
    group: Tensor | None = None  #: (N,) int64
    row_weight: Tensor | None = None  #: (N,) floating

    def __len__(self) -> int:
        return len(self.embeddings)

    def with_grad(self) -> Rows:
        """The same rows, their embeddings a leaf of its own that requires grad."""
        return replace(self, embeddings=self.embeddings.detach().requires_grad_())


@dataclass(frozen=True)
class Mix:
    """What the rows of a batch are known to be."""

    set_table: list[list[int]]  #: of each candidate set the classes a row may belong to
    probability: list[float] = field(default_factory=list)  #: of each candidate set; none: all alike
    label_weight: float = 1.0


def _realistic() -> Mix:
    """Two partly annotated cohorts within an unlabelled one: 14 sets over 8 organs and two classes of "nothing".

    One cohort annotates organs 0 to 4 and the other 3 to 7, so the background of one may be an organ of the other.
    A row on a border may be what lies on either side.
    """
    nothing = [ORGANS, ORGANS + 1]
    organs = [[organ] for organ in range(ORGANS)]
    backgrounds = [[5, 6, 7, *nothing], [0, 1, 2, *nothing]]
    borders = [[0, *backgrounds[0]], [1, 2], [4, *backgrounds[1]]]
    sizes = [0.06, 0.03, 0.02, 0.02, 0.01, 0.01, 0.005, 0.005]
    return Mix([list(range(ORGANS + 2)), *organs, *backgrounds, *borders], [0.6, *sizes, 0.09, 0.09, 0.02, 0.02, 0.02])


MIXES = {
    "unlabelled": Mix([[0, 1]]),
    "classes10": Mix([[c] for c in range(10)]),
    "classes1000": Mix([[c] for c in range(1000)]),
    "realistic": _realistic(),
    # The same embeddings and kernel without a label in sight: what masking costs is measured against it.
    "infonce": Mix([[0, 1]], label_weight=0.0),
}


def make_rows(mix: str, rows: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Rows:
    """Draw rows; the embeddings are alike for all mixes: points in clusters, each seen twice with some noise."""
    generator = torch.Generator(device).manual_seed(seed)
    point = torch.arange(rows, device=device)
    point = torch.where(point < rows // 2, point, point - rows // 2)
    alone = point >= rows // 2
    centre = normal(ORGANS, width, generator)
    cluster = torch.randint(ORGANS, (rows // 2 + 1,), generator=generator, device=device)
    points = 0.5 * centre[cluster] + normal(len(cluster), width, generator)
    embeddings = points[point] + 0.7 * normal(rows, width, generator)
    embeddings = normalize(embeddings.to(torch.promote_types(dtype, torch.float32)), dim=1).to(dtype)

    chosen = MIXES[mix]
    table = torch.zeros(len(chosen.set_table), 1 + max(map(max, chosen.set_table)), dtype=torch.bool)
    for row, classes in zip(table, chosen.set_table, strict=True):
        row[classes] = True
    probability = torch.tensor(chosen.probability or [1.0] * len(table), device=device)
    of_point = torch.multinomial(probability, rows // 2 + 1, replacement=True, generator=generator)
    return Rows(
        embeddings,
        torch.where(alone, -1, point),
        of_point[point],
        table.to(device),
        label_weight=chosen.label_weight,
    )


def with_every_argument(rows: Rows) -> Rows:
    """The same rows with groups of neighbours and with row weights."""
    order = torch.arange(len(rows), device=rows.embeddings.device)
    return replace(rows, group=order // 5 % max(len(rows) // 20, 1) - 1, row_weight=(order % 7 / 3).float())


def nearly_converged(rows: int, width: int, dtype: torch.dtype, device: torch.device, mass: float) -> Rows:
    """Unlabelled twins at the temperature where they hold ``mass`` of the softmax on average.

    Softmax minus target is then a small difference of nearly equal numbers.
    """
    generator = torch.Generator(device).manual_seed(0)
    centre = normal(rows // 2, width, generator).repeat_interleave(2, 0)
    embeddings = normalize(centre + 0.02 * normal(rows, width, generator), dim=1).to(dtype)
    return Rows(
        embeddings,
        torch.arange(rows, device=device) // 2,
        torch.zeros(rows, dtype=torch.int64, device=device),
        torch.ones(1, 3, dtype=torch.bool, device=device),
        temperature=temperature_for_mass(embeddings.double(), mass),
    )


def temperature_for_mass(embeddings: Tensor, mass: float) -> float:
    """By bisection; rows 2k and 2k + 1 are twins."""
    low, high = 0.01, 1.0
    cosine = (embeddings @ embeddings.T).fill_diagonal_(-math.inf)
    row = torch.arange(len(embeddings), device=embeddings.device)
    for _ in range(40):
        middle = math.sqrt(low * high)
        reached = (cosine / middle).softmax(1)[row, row ^ 1].mean() > mass
        low, high = (middle, high) if reached else (low, middle)
    return low


def normal(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, width, generator=generator, device=generator.device)
