"""What else computes the loss, or a part of it. None of it uses the implementation that is measured.

Each function takes :class:`inputs.Rows` whose embeddings may require grad and returns the loss, 0-d. Where nothing else
is said, similarities are rounded as a product in the embeddings' dtype rounds them, and what follows is float32
(float64 for float64 rows). Only the reference knows groups and row weights.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from inputs import Rows
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from mixcl_dist.kernels import mixed_contrastive_loss

CHUNK = 2048  #: rows of one chunk
FLEX_BLOCK = 128
DIFF, SAME, OPEN = range(3)


@dataclass(frozen=True)
class Baseline:
    """A baseline and what it is good for."""

    name: str
    family: str
    loss: Callable[[Rows], Tensor]
    mix: str = "realistic"
    identity_weight: float = 1.0
    label_weight: float = 1.0
    needs: str | None = None  #: a package that may not be installed
    cuda_only: bool = False
    normalises: bool = False  #: it takes cosines, so its gradient has no part along a row
    compiles: bool = False
    peak_bytes: Callable[[int, int], int] = lambda rows, width: 0  #: in float32, as measured; 0: less than N² bytes

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        if self.cuda_only and device.type != "cuda":
            return "needs a GPU"
        if self.needs is not None:
            try:
                importlib.import_module(self.needs)
            except ImportError as error:
                return f"{self.needs} is not installed" if error.name == self.needs else f"{self.needs}: {error}"
        return None


def reference(rows: Rows) -> Tensor:
    """The whole objective as ``kernels/reference.py`` defines it: dense, eager, in float32."""
    return mixed_contrastive_loss(**vars(rows), implementation="reference").loss


def dense(rows: Rows) -> Tensor:
    """The whole objective, dense and eager, written to be lean: masks of one byte, one product."""
    return _mean_over_anchors(rows, row_terms(rows.embeddings, *_columns(rows)))


def dense_compiled(rows: Rows) -> Tensor:
    """:func:`dense` under ``torch.compile``: masks and reductions are fused, the N×N product is kept."""
    return _mean_over_anchors(rows, _compiled_row_terms()(rows.embeddings, *_columns(rows)))


def chunked(rows: Rows) -> Tensor:
    """The whole objective, some thousand rows against all columns at a time, made again in the backward."""
    return _chunked(rows, row_terms)


def chunked_compiled(rows: Rows) -> Tensor:
    """:func:`chunked` with what is done for a chunk under ``torch.compile``."""
    return _chunked(rows, _compiled_row_terms())


def row_terms(
    anchors: Tensor,
    anchor_index: Tensor,
    columns: Tensor,
    identity: Tensor,
    candidate_set: Tensor,
    relations: Tensor,
    temperature: float,
    identity_weight: float,
    label_weight: float,
) -> tuple[Tensor, Tensor]:
    """Sum over anchors of each relation's terms, (2,), and the numbers of anchors, (2,).

    ``anchors`` (M, D) are the rows ``anchor_index`` (M,) of ``columns`` (N, D); ``identity`` and ``candidate_set``
    belong to the columns; ``relations`` (S, S) uint8.
    """
    similarity = _wide(anchors @ columns.T) / temperature
    other = anchor_index[:, None] != torch.arange(len(columns), device=columns.device)
    relation = relations[candidate_set[anchor_index]].index_select(1, candidate_set)
    own_identity = identity[anchor_index, None]
    twin = (own_identity == identity) & (own_identity >= 0) & other
    same = (relation == SAME) & other
    identity_terms = label_terms = similarity.new_zeros(2)
    if identity_weight > 0:
        identity_terms = _relation_terms(similarity, twin, twin | (other & ~same))
    if label_weight > 0:
        label_terms = _relation_terms(similarity, same, same | ((relation == DIFF) & ~twin))
    terms = torch.stack([identity_terms, label_terms])
    return terms[:, 0], terms[:, 1].detach()


def _relation_terms(similarity: Tensor, positive: Tensor, member: Tensor) -> Tensor:
    """(2,) the sum over anchors of lse − mean positive similarity, and the number of anchors."""
    count = positive.sum(1)
    anchor = count > 0
    lse = similarity.masked_fill(~member, -torch.inf).logsumexp(1)
    mean = similarity.masked_fill(~positive, 0).sum(1) / count.clamp(min=1)
    return torch.stack([torch.where(anchor, lse - mean, 0).sum(), anchor.sum().to(similarity.dtype)])


def _columns(rows: Rows) -> tuple:
    """The arguments of :func:`row_terms` from ``anchor_index`` on, for all rows."""
    index = torch.arange(len(rows), device=rows.embeddings.device)
    relations = _relation_table(rows.set_table)
    settings = rows.temperature, rows.identity_weight, rows.label_weight
    return index, rows.embeddings, rows.identity, rows.candidate_set, relations, *settings


def _relation_table(set_table: Tensor) -> Tensor:
    common = set_table.float() @ set_table.float().T
    single = set_table.sum(1) == 1
    same = single[:, None] & single & (common > 0)
    return torch.where(common == 0, DIFF, torch.where(same, SAME, OPEN)).to(torch.uint8)


def _mean_over_anchors(rows: Rows, terms: tuple[Tensor, Tensor]) -> Tensor:
    total, anchors = terms
    identity, label = total / anchors.clamp(min=1)
    return rows.identity_weight * identity + rows.label_weight * label


def _chunked(rows: Rows, terms: Callable) -> Tensor:
    index, *columns = _columns(rows)
    parts = [
        checkpoint(terms, rows.embeddings[chunk], chunk, *columns, use_reentrant=False, preserve_rng_state=False)
        for chunk in index.split(CHUNK)
    ]
    return _mean_over_anchors(rows, tuple(map(sum, zip(*parts, strict=True))))


@functools.cache
def _compiled_row_terms() -> Callable:
    # With fixed shapes each N is compiled anew, and is as fast as the compiler can make it.
    return torch.compile(row_terms, dynamic=False)


def flex(rows: Rows) -> Tensor:
    """The identity relation alone, by FlexAttention's log-sum-exp and its derivative.

    Sorts the rows and marks blocks that need no mask, as the step would have to for every batch. Attention also
    needs values: 16 columns of zeros, its least. Softmax weights are rounded to the embeddings' dtype before the
    product of the backward, and their targets are subtracted after it, so little of the gradient is left near
    convergence. It has no label relation, takes rows with one twin at most, and has no backward on the CPU.
    """
    order = torch.argsort(rows.identity, stable=True)
    key = _single_class(rows)
    order = order[torch.argsort(key[order], stable=True)]
    z, key, twin = rows.embeddings[order], key[order], _twin(rows.identity[order])

    def is_member(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((twin[i] == j) | (key[i] != key[j]) | (key[i] < 0)) & (i != j)

    query = z[None, None]
    attention = _compiled_flex() if z.is_cuda else flex_attention
    _, aux = attention(
        query,
        query,
        query.new_zeros(1, 1, len(z), 16),
        block_mask=_flex_blocks(twin, key, rows.set_table.shape[1], is_member),
        scale=1 / rows.temperature,
        return_aux=AuxRequest(lse=True),
    )
    positive = (_wide(z) * _wide(z[twin])).sum(1) / rows.temperature
    anchor = twin != torch.arange(len(twin), device=twin.device)
    terms = torch.where(anchor, aux.lse[0, 0] - positive, 0)
    return rows.identity_weight * terms.sum() / anchor.sum().clamp(min=1)


@functools.cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


def _single_class(rows: Rows) -> Tensor:
    """(N,) int64: the class of a row that can be of one class only, −1 of any other row."""
    single = rows.set_table.sum(1) == 1
    return torch.where(single, rows.set_table.to(torch.uint8).argmax(1), -1)[rows.candidate_set]


def _twin(identity: Tensor) -> Tensor:
    """(N,) int64: the twin of each row, the row itself where it has none."""
    order = torch.argsort(identity, stable=True)
    key = identity[order]
    before, after = (torch.where((key == key.roll(step)) & (key >= 0), order.roll(step), order) for step in (1, -1))
    return torch.empty_like(order).scatter_(0, order, torch.where(before == order, after, before))


def _flex_blocks(twin: Tensor, key: Tensor, classes: int, is_member: Callable) -> BlockMask:
    """Which blocks of the sorted rows are left out, need a mask, or are whole."""
    rows = len(key)
    blocks = -(-rows // FLEX_BLOCK)
    block = torch.arange(rows, device=key.device) // FLEX_BLOCK
    has_class = torch.zeros(blocks, classes + 1, device=key.device)
    has_class[block, key + 1] = 1  # column 0: rows of no single class
    share_class = has_class[:, 1:] @ has_class[:, 1:].T > 0
    is_pure = (has_class.sum(1) == 1) & (has_class[:, 0] == 0)
    masked = share_class | torch.eye(blocks, dtype=torch.bool, device=key.device)
    left_out = share_class & is_pure[:, None] & is_pure
    masked[block, block[twin]] = True
    left_out[block, block[twin]] = False
    if rows % FLEX_BLOCK:
        masked[-1] = masked[:, -1] = True
    masked &= ~left_out
    lists = []
    for kind in (masked, ~(masked | left_out)):
        indices = torch.argsort(kind.to(torch.uint8), dim=1, descending=True, stable=True)
        lists += [kind.sum(1)[None, None].int(), indices[None, None].int()]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=FLEX_BLOCK, mask_mod=is_member, seq_lengths=(rows, rows))


def inf_cl(rows: Rows) -> Tensor:
    """InfoNCE of unlabelled twins by Inf-CL's Triton kernels (``cal_flash_loss``), in float32 with tf32 products.

    They contrast two lists of rows and know no mask: all rows are given as both, and each row's similarity with
    itself is taken out of its log-sum-exp afterwards. The rows must all have one twin.
    """
    from inf_cl import cal_flash_loss

    z = rows.embeddings.float()
    width = z.shape[1]
    twin = _twin(rows.identity)
    head = next(size for size in (256, 128, 64, 32, 16) if width % size == 0)
    positive = (z * z[twin]).sum(1) / rows.temperature
    with_itself = cal_flash_loss(z, z, twin, scale=1 / rows.temperature, head_dim=head) + positive
    itself = z.square().sum(1) / rows.temperature
    lse = with_itself + torch.log1p(-torch.exp(itself - with_itself))
    return rows.identity_weight * (lse - positive).mean()


def monai(rows: Rows) -> Tensor:
    """InfoNCE of unlabelled twins by MONAI's ``ContrastiveLoss``, in float32; it multiplies out N×N×D.

    It takes cosines, so rows that rounding made longer or shorter than 1 count as if they were of length 1.
    """
    from monai.losses import ContrastiveLoss

    pairs = torch.argsort(rows.identity, stable=True).view(-1, 2)
    first, second = _wide(rows.embeddings)[pairs].unbind(1)
    return rows.identity_weight * ContrastiveLoss(temperature=rows.temperature)(first, second)


def pytorch_metric_learning(rows: Rows) -> Tensor:
    """The label relation of fully labelled rows by pytorch-metric-learning's ``SupConLoss``, dense, in float32.

    Set k must be class k. Its denominators would hold twins of another class. It takes cosines, as MONAI does.
    """
    from pytorch_metric_learning.losses import SupConLoss

    return rows.label_weight * SupConLoss(temperature=rows.temperature)(_wide(rows.embeddings), rows.candidate_set)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _per_pair(size: int) -> Callable[[int, int], int]:
    return lambda rows, width: size * rows**2


BASELINES = [
    Baseline("reference", "dense", reference, peak_bytes=_per_pair(36)),
    Baseline("dense eager", "dense", dense, peak_bytes=_per_pair(29)),
    Baseline("dense compiled", "dense", dense_compiled, compiles=True, peak_bytes=_per_pair(11)),
    Baseline("chunked eager", "chunked", chunked),
    Baseline("chunked compiled", "chunked", chunked_compiled, compiles=True),
    Baseline("FlexAttention", "flex", flex, label_weight=0.0, cuda_only=True, compiles=True),
    Baseline(
        "MONAI",
        "dense",
        monai,
        mix="infonce",
        label_weight=0.0,
        needs="monai",
        normalises=True,
        peak_bytes=lambda rows, width: 24 * rows**2 * width,
    ),
    Baseline(
        "pytorch-metric-learning",
        "dense",
        pytorch_metric_learning,
        mix="classes10",
        identity_weight=0.0,
        needs="pytorch_metric_learning",
        normalises=True,
        peak_bytes=_per_pair(49),
    ),
    # Last: a fault in foreign kernels would take the process's GPU with it.
    Baseline("Inf-CL", "inf-cl", inf_cl, mix="infonce", label_weight=0.0, needs="inf_cl", cuda_only=True),
]
