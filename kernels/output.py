"""What the loss returns, whichever path computed it."""

from __future__ import annotations

from typing import NamedTuple

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
