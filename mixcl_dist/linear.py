"""Linear classifiers of a decoder pyramid's voxel features, where only some classes are known of a scan.

Legend: N patches, (X, Y, Z) their size, C classes, F channels of the pyramid, R sampled voxels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mixcl_dist.data_shards.catalogue import IGNORED
from mixcl_dist.networks.heads import voxels_of

VOXELS_OF_CLASS, VOXELS_OF_REST = 100, 400
"""Voxels sampled at most of each class in each patch, and of what is no class."""
FOREGROUND_WEIGHT = 5.0
"""Of a class's voxel, where one of the background has 1, in fine-tuning too: organs are a few percent of a patch."""
PENALTY = 1e-4
"""On the squared weights of the classifier of standardised features."""
ITERATIONS = 100


@dataclass(frozen=True)
class Voxels:
    """Voxels that stand for all of their patches."""

    features: Tensor
    """(R, F) float32."""
    label: Tensor
    """(R,) int64 in 0 … C."""
    weight: Tensor
    """(R,) float32: how many voxels each stands for."""
    patch: Tensor
    """(R,) int64."""
    known: Tensor
    """(R, C + 1) bool: the classes that are reliably annotated there, entry 0 (background) False."""

    @classmethod
    def joined(cls, parts: Iterable[Voxels]) -> Voxels:
        columns = ((v.features, v.label, v.weight, v.patch, v.known) for v in parts)
        return cls(*(torch.cat(column) for column in zip(*columns, strict=True)))

    @property
    def importance(self) -> Tensor:
        """(R,) float32: the weight, of a class's voxel `FOREGROUND_WEIGHT` times that."""
        return self.weight * torch.where(self.label > 0, FOREGROUND_WEIGHT, 1.0)

    def thinned(self, count: int) -> Voxels:
        """At most `count` of them, which stand for all."""
        step = -(-len(self.label) // count)
        return Voxels(*(t[::step] for t in (self.features, self.label, self.weight * step, self.patch, self.known)))


def sample(pyramid: list[Tensor], label: np.ndarray, known: np.ndarray, first: int) -> Voxels:
    """Voxels of the patches that the pyramid is of, numbered from `first` on, which seeds the choice: the same share of
    every class in each, at most `VOXELS_OF_CLASS` or `VOXELS_OF_REST` of them.

    `label` (N, X, Y, Z) uint8 in 0 … C or `IGNORED`, `known` (N, C + 1) bool, as in `Voxels`.
    """
    parts = []
    for row in range(len(label)):
        chosen, weight = _choose(label[row], np.random.default_rng(first + row))
        position = np.stack(np.unravel_index(chosen, label[row].shape), axis=1)
        index = torch.from_numpy(np.insert(position, 0, row, axis=1)).to(pyramid[0].device)
        parts.append(
            Voxels(
                features=voxels_of(pyramid, index).float().cpu(),
                label=torch.from_numpy(label[row].ravel()[chosen].astype(np.int64)),
                weight=torch.from_numpy(weight),
                patch=torch.full((len(chosen),), first + row),
                known=torch.from_numpy(known[row]).expand(len(chosen), -1),
            )
        )
    return Voxels.joined(parts)


def _choose(label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions of sampled voxels in the flat patch, and how many voxels each stands for, float32."""
    flat = label.ravel()
    chosen, weights = [np.zeros(0, np.intp)], [np.zeros(0, np.float32)]  # a patch may be ignored as a whole
    for number in np.setdiff1d(flat, IGNORED):
        voxels = np.flatnonzero(flat == number)
        most = VOXELS_OF_CLASS if number else VOXELS_OF_REST
        taken = voxels if len(voxels) <= most else rng.choice(voxels, most, replace=False)
        chosen.append(taken)
        weights.append(np.full(len(taken), len(voxels) / len(taken), np.float32))
    return np.concatenate(chosen), np.concatenate(weights)


@torch.enable_grad()
def fit(voxels: Voxels) -> tuple[Tensor, Tensor]:
    """(C + 1, F) weights and (C + 1,) biases of multinomial logistic regression, by L-BFGS on standardised features.

    A background voxel may be of any class that is not known in its scan, so those probabilities are added up, as in
    `marginal_loss`.
    """
    mean, deviation = voxels.features.mean(0), voxels.features.std(0)
    scale = 1 / deviation.clamp_min(1e-6)
    features = (voxels.features - mean) * scale
    weight = torch.zeros(voxels.known.shape[1], features.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    foreground = voxels.label > 0
    importance = voxels.importance / voxels.importance.sum()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        log_probability = F.linear(features, weight, bias).log_softmax(1)
        rest = log_probability.masked_fill(voxels.known, -torch.inf).logsumexp(1)
        of_class = log_probability.gather(1, voxels.label[:, None])[:, 0]
        value = -(importance * torch.where(foreground, of_class, rest)).sum() + PENALTY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = weight.detach() * scale, bias.detach()
    return weight, bias - weight @ mean


def of_levels(weight: Tensor, pyramid: list[Tensor]) -> list[Tensor]:
    """(C + 1, F) weights, in the order of `voxels_of`, as those of each level of the pyramid, in its order."""
    finest, *coarse = weight.split([level.shape[1] for level in (pyramid[-1], *pyramid[:-1])], dim=1)
    return [*coarse, finest]
