"""What every backbone is."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mixcl_dist.networks.spacing import multiples


class Backbone(nn.Module):
    """Encoder and decoder of a public network; its parameters carry that network's own names.

    Legend: V views or images, F features of a voxel, G channels of the bottleneck.
    """

    level_divisor: tuple[int, int, int]
    """What the edges of an image must be multiples of."""
    recomputes = False
    """Whether the backward pass computes the activations of each block again, of which then none are kept."""

    def levels(self) -> list[list[nn.Parameter]]:
        """All parameters from the last layers to the first: the decoder's levels, the bottleneck, the encoder's."""
        raise NotImplementedError

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(V, 1, x, y, z) → the decoder's pyramid: the bottleneck (V, G, x/d, y/d, z/d), d of `level_divisor`, then
        each level at twice the resolution of the one before, along a coarse axis at the same, up to (V, F, x, y, z).

        Raises `ValueError` where d does not divide an edge.
        """
        self.check(image)
        return self.pyramid(image)

    def pyramid(self, image: torch.Tensor) -> list[torch.Tensor]:
        raise NotImplementedError

    def check(self, image: torch.Tensor) -> None:
        if any(edge % step for edge, step in zip(image.shape[2:], self.level_divisor, strict=True)):
            raise ValueError(f"image of {tuple(image.shape[2:])} voxels: {multiples(self.level_divisor)}")

    def _run(self, block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)
