"""What the loss returns, whichever path computed it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MixedContrastiveOutput(NamedTuple):
    """The loss and what is worth plotting beside it.

    Only ``loss`` is differentiable. Floating outputs are float32, or float64 for float64 embeddings.
    A relation without anchors, or switched off by a weight of 0, has loss 0, ``lse`` −inf, floor 0
    and similarity NaN.
    """

    loss: Tensor  #: 0-d, ``identity_weight * identity_loss + label_weight * label_loss``
    identity_loss: Tensor  #: 0-d, unweighted
    label_loss: Tensor  #: 0-d, unweighted
    lse: Tensor  #: (2, N), log-sum-exp over each row's positives and negatives: identity, label
    identity_anchors: Tensor  #: 0-d int64, rows that have a twin
    label_anchors: Tensor  #: 0-d int64, rows that have another row of their own single class
    identity_floor: Tensor  #: 0-d, the least value ``identity_loss`` can take
    label_floor: Tensor  #: 0-d, the least value ``label_loss`` can take
    identity_similarity: Tensor  #: 0-d, mean inner product with positives (cosine for unit rows)
    label_similarity: Tensor  #: 0-d, the same for the label relation


def compute_dtype(embeddings: Tensor) -> torch.dtype:
    """What embeddings are computed in."""
    return torch.float64 if embeddings.dtype == torch.float64 else torch.float32


def empty_outputs(embeddings: Tensor) -> list[Tensor]:
    """What the operator returns, to be filled: the loss; of both relations loss, lse, anchors, floor, similarity."""
    dtype = compute_dtype(embeddings)
    return [
        embeddings.new_empty((), dtype=dtype),
        embeddings.new_empty(2, dtype=dtype),
        embeddings.new_empty(2, embeddings.shape[0], dtype=torch.float64),
        embeddings.new_empty(2, dtype=torch.int64),
        embeddings.new_empty(2, dtype=dtype),
        embeddings.new_empty(2, dtype=dtype),
    ]
