"""How embeddings lie on the sphere: near their partners, and far from the others (Wang and Isola 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from mixcl_dist.kernels.relations import number


@torch.no_grad()
def alignment_and_uniformity(embeddings: Tensor, identity: Tensor, *, rows: int = 4096) -> tuple[Tensor, Tensor]:
    """Alignment and uniformity of unit rows, from at most so many of them (Wang and Isola 2020, with α = t = 2).

    Alignment is the mean of |z_i − z_p|² over pairs of one identity: 0 where twins coincide. Uniformity is the
    logarithm of the mean of exp(−2 |z_i − z_j|²) over all pairs: 0 where all rows coincide, down to about −4 where
    they are spread over a sphere of many dimensions. Costs ``rows``² · D, and waits for the device.

    Args:
        embeddings: (N, D) floating, of length 1.
        identity: (N,) int64; rows of one identity ≥ 0 are twins, −1: no twin.
        rows: how many rows to look at, evenly chosen, twins together.

    Returns:
        Two 0-d float32 tensors; NaN without twins, or with fewer than two rows.
    """
    numbers, _ = number(identity)
    chosen = (numbers % max(1, -(-len(numbers) // rows)) == 0).nonzero()[:rows, 0]
    z, numbers = embeddings[chosen].float(), numbers[chosen]
    first, second = torch.triu_indices(len(z), len(z), offset=1, device=z.device)
    distance = torch.nn.functional.pdist(z).square()
    twins = numbers[first] == numbers[second]
    return distance[twins].mean(), (-2 * distance).exp().mean().log()
