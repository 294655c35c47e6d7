"""The mixed contrastive loss: identity and label contrast over partly labelled rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mixcl_dist.kernels.checks import check_arguments, check_values
from mixcl_dist.kernels.distributed import name_of
from mixcl_dist.kernels.implementation import IMPLEMENTATIONS
from mixcl_dist.kernels.op import mixed_contrastive
from mixcl_dist.kernels.output import MixedContrastiveOutput, compute_dtype
from mixcl_dist.kernels.reference import mixed_contrastive_reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def mixed_contrastive_loss(
    embeddings: Tensor,
    identity: Tensor,
    candidate_set: Tensor,
    set_table: Tensor,
    *,
    group: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    row_weight: Tensor | None = None,
    present: Tensor | None = None,
    identity_weight: float = 1.0,
    label_weight: float = 1.0,
    process_group: ProcessGroup | None = None,
    implementation: str = "auto",
    validate: bool = False,
) -> MixedContrastiveOutput:
    """Contrast rows by identity and by what is known of their class (``kernels/README.md`` has the formulas).

    Args:
        embeddings: (N, D) float16, bfloat16, float32 or float64; L2-normalised by the caller. Half precision
            is computed in float32. N may be 0.
        identity: (N,) int64. Rows of one identity ≥ 0 are views of one thing and attract; −1: no partner.
        candidate_set: (N,) int32 or int64, index into ``set_table``.
        set_table: (S, C) bool, the classes a row of each set may belong to, at least one each. Rows of the
            same single class attract, rows without a common class repel, nothing is assumed of other pairs.
        group: (N,) int32 or int64. Rows of one group ≥ 0 are never each other's negatives.
        temperature: > 0, a number or a 0-d floating tensor; differentiated where it requires grad.
        row_weight: (N,) floating, ≥ 0, the weight of a row as anchor; not differentiated.
        present: (N,) bool. Rows that are not present take no part: they are no anchors and no negatives, their ``lse``
            is −inf and their gradient 0. So a batch may have one number of rows however many it found.
        identity_weight: weight of the identity relation, ≥ 0; 0 switches it off.
        label_weight: weight of the label relation, ≥ 0; 0 switches it off.
        process_group: contrast with the rows of all its processes, as if their rows were one batch. N may differ
            between them and be 0, all else has to be equal, also the gradient that comes to the loss (on a GPU
            contents are not compared). All have to call, and to go backward. The gradient is multiplied by
            the number of processes, as DDP and DeepSpeed take the mean.
        implementation: "triton", fused kernels for GPUs of float16, bfloat16 or float32 rows; "tiled", plain PyTorch;
            neither holds an N×N matrix nor has a second derivative; "reference", dense, O(N²) memory, one process;
            "auto", the first of these that runs here.
        validate: check contents of tensors on a GPU, too, which waits for it; on a CPU they always are.

    Returns:
        :class:`MixedContrastiveOutput`. Without rows or anchors the loss is 0 with zero gradients; an
        embedding that is not finite makes it NaN. With a process group ``lse`` is of this process's rows, and
        everything else of all rows, the same on every process.

    Raises:
        ValueError: for a wrong shape, dtype or device, an index outside ``set_table``, a set without a
            class, a temperature or weight out of range, an implementation that is not there, or processes that
            disagree. It names the argument and the value.
        TimeoutError: some processes of the group did not call within its time-out; it names them.
    """
    check_arguments(
        embeddings,
        identity,
        candidate_set,
        set_table,
        group,
        temperature,
        row_weight,
        present,
        identity_weight,
        label_weight,
    )
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"implementation: expected one of {('auto', *IMPLEMENTATIONS)}, got {implementation!r}")
    if not isinstance(temperature, Tensor):
        temperature = embeddings.new_full((), temperature, dtype=compute_dtype(embeddings))
    arguments = (
        embeddings,
        identity,
        candidate_set,
        set_table,
        group,
        temperature,
        row_weight,
        present,
        identity_weight,
        label_weight,
    )
    name = name_of(process_group)
    if name and implementation == "reference":
        raise ValueError('implementation: "reference" is for one process, got a process_group of several')
    if validate or implementation == "reference":
        check_values(candidate_set, set_table, temperature, row_weight)
    with torch.autocast(embeddings.device.type, enabled=False):
        if implementation == "reference":
            return mixed_contrastive_reference(*arguments)
        loss, losses, lse, anchors, floors, similarities, _ = mixed_contrastive(*arguments, name, implementation)
    return MixedContrastiveOutput._make([loss, *losses, lse.to(loss.dtype), *anchors, *floors, *similarities])


class MixedContrastiveLoss(nn.Module):
    """:func:`mixed_contrastive_loss` with its settings; one module may serve voxel and crop rows.

    Args:
        set_table: (S, C) bool, see :func:`mixed_contrastive_loss`; a buffer that is saved with the module.
        temperature: > 0.
        learnable_temperature: learn log τ as the parameter ``log_temperature``, from ``temperature`` on.
        temperature_range: bounds of a learnable temperature. At a bound the gradient is kept only where it
            leads back inside.
        identity_weight: weight of the identity relation, ≥ 0.
        label_weight: weight of the label relation, ≥ 0.
        implementation: see :func:`mixed_contrastive_loss`.

    Raises:
        ValueError: where a learnable ``temperature`` lies outside ``temperature_range``; what the function
            refuses is refused when the module is called.
    """

    def __init__(
        self,
        set_table: Tensor,
        *,
        temperature: float = 0.1,
        learnable_temperature: bool = False,
        temperature_range: tuple[float, float] = (0.01, 1.0),
        identity_weight: float = 1.0,
        label_weight: float = 1.0,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.set_table: Tensor
        lowest, highest = temperature_range
        if learnable_temperature and not 0 < lowest <= temperature <= highest < math.inf:
            raise ValueError(f"temperature: expected a value within {temperature_range}, got {temperature}")
        self.register_buffer("set_table", set_table)
        self.fixed_temperature = temperature
        # One element, not 0-d, which DeepSpeed cannot broadcast.
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)])) if learnable_temperature else None
        self.log_range = math.log(lowest), math.log(highest)
        self.identity_weight = identity_weight
        self.label_weight = label_weight
        self.implementation = implementation

    @property
    def temperature(self) -> float | Tensor:
        if self.log_temperature is None:
            return self.fixed_temperature
        return _Clamp.apply(self.log_temperature, *self.log_range).exp()[0]

    def forward(
        self,
        embeddings: Tensor,
        identity: Tensor,
        candidate_set: Tensor,
        *,
        group: Tensor | None = None,
        row_weight: Tensor | None = None,
        present: Tensor | None = None,
        process_group: ProcessGroup | None = None,
    ) -> MixedContrastiveOutput:
        """See :func:`mixed_contrastive_loss`."""
        return mixed_contrastive_loss(
            embeddings,
            identity,
            candidate_set,
            self.set_table,
            group=group,
            temperature=self.temperature,
            row_weight=row_weight,
            present=present,
            identity_weight=self.identity_weight,
            label_weight=self.label_weight,
            process_group=process_group,
            implementation=self.implementation,
        )


class _Clamp(torch.autograd.Function):
    """clamp() whose gradient vanishes only where descent would lead further out.

    The plain clamp has no gradient outside its bounds, so a parameter that one step carried over a bound
    would never come back.
    """

    @staticmethod
    def forward(ctx, value: Tensor, lowest: float, highest: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.range = lowest, highest
        return value.clamp(lowest, highest)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (value,) = ctx.saved_tensors
        lowest, highest = ctx.range
        outward = ((value <= lowest) & (gradient > 0)) | ((value >= highest) & (gradient < 0))
        return gradient.masked_fill(outward, 0), None, None
