"""What tells a pre-training that learns from one that only falls: the gradient of each term, and how rows are spread.

Nothing here waits for the device, and nothing changes what is learnt.
Legend: R rows, D width of an embedding, M sampled pairs of twins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from mixcl_dist.networks.heads import PretrainNetwork
from mixcl_dist.pretraining.objective import mixcl_loss
from mixcl_dist.pretraining.rows import Rows
from mixcl_dist.pretraining.views import Views
from mixcl_dist.settings import ObjectiveConfig

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SAMPLED_ROWS = 4096
"""Uniformity takes all pairs of a view's rows, and with more the figures hardly change."""


def gradient_norms(
    network: PretrainNetwork,
    views: Views,
    rows: Rows,
    config: ObjectiveConfig,
    process_group: ProcessGroup | None = None,
) -> dict[str, torch.Tensor]:
    """Norm of the gradient of each term, weighted as it enters the loss, on the backbone's parameters; all 0-d.

    It is that of this process's part of the batch, before any averaging over ranks or passes and before clipping. Costs
    a forward and a backward pass for each term. The parameters have to be whole: at ZeRO stage 3 they are not.
    """
    # Not `network(…)`: that runs DeepSpeed's hooks, which belong to its own passes, and what was compiled, which gives
    # its buffers away in the first of several backward passes.
    output = network.forward(views.image, rows.voxel_index)
    parameters = list(network.backbone.parameters())
    norms = {}
    for term, alone in config.single_terms().items():
        loss, _ = mixcl_loss(output, views, rows, alone, process_group)
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        norms[f"gradient_norm_{term}"] = get_total_norm([grad for grad in gradients if grad is not None])
    return norms


@torch.no_grad()
def spread(voxel: torch.Tensor, present: torch.Tensor) -> dict[str, torch.Tensor]:
    """Whether twins agree and other rows differ, of up to `SAMPLED_ROWS` of the rows (R, D), as `Rows` orders them.

    `alignment` is the mean squared distance of twins, `uniformity` log mean exp(−2 d²) over pairs of different points
    in one view (Wang and Isola, ICML 2020), both 0-d float32 and NaN without rows; `second_moment` (D, D) float64 is
    the sum of z zᵀ over the sampled rows, of which `effective_rank` is computed. Rows not `present` (R,) do not count.
    """
    pairs = len(voxel) // 2
    sampled = min(pairs, SAMPLED_ROWS // 2)
    chosen = torch.arange(sampled, device=voxel.device) * pairs // max(sampled, 1)  # evenly, so from every patch
    z = F.normalize(voxel.float(), dim=1).unflatten(0, (2, pairs))[:, chosen]
    counts = present[:pairs][chosen].float()
    alignment = (z[0] - z[1]).square().sum(1) @ counts / counts.sum()
    both = counts.outer(counts).fill_diagonal_(0)
    potential = (4 * (z @ z.mT) - 4).exp() * both  # d² = 2 − 2 cos
    uniformity = (potential.sum((1, 2)) / both.sum()).log().mean()
    kept = (z * counts[:, None]).flatten(0, 1).double()
    return {"alignment": alignment, "uniformity": uniformity, "second_moment": kept.mT @ kept}


def effective_rank(second_moment: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values of rows (Roy and Vetterli, EUSIPCO 2007): 1 to D.

    Takes Zᵀ Z (D, D) float64 in main memory, as a decomposition on a GPU would make the host wait; NaN without rows.
    """
    values = torch.linalg.eigvalsh(second_moment).clamp_min(0).sqrt()
    share = values / values.sum()
    return float((-torch.xlogy(share, share).sum()).exp())
