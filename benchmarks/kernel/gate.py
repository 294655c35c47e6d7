"""Is it right? Compared with the reference in float64 on the rounded rows; nothing is timed before this passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from baselines import Baseline, chunked
from inputs import MIXES, Rows, make_rows, nearly_converged, with_every_argument
from torch import Tensor
from torch.nn.functional import normalize

from mixcl_dist.kernels import mixed_contrastive_loss, tuning

LOSS_ERROR = 1e-4  #: of the loss, or of 1 where the loss is less
GRADIENT_ERROR = 3e-3  #: of the norm; the temperature's gradient is held to it, too
CONVERGED_ERROR = 5e-3
REFERENCE_ROWS = 8192  #: beyond these the reference's place is taken by its equal in chunks, in float64, too
CONVERGED_MASSES = (0.99, 0.9999)
HALF = (torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """One comparison."""

    name: str
    rows: Rows
    mass: float | None = None  #: softmax weight of the positives, where they nearly have it all


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """All sizes, widths, dtypes, mixes and arguments, not each with each."""
    bf16, fp32 = torch.bfloat16, torch.float32
    on_gpu = device.type == "cuda"
    widths = (64, 128) if quick else (64, 128, 192, 256, 768)
    counts = (1, 129, 513) if quick else (1, 2, 129, 1000, 4097 if on_gpu else 1025)
    for dtype in (*HALF, fp32):
        for width in widths:
            yield Case("realistic", make_rows("realistic", counts[-1], width, dtype, device))
    for count in counts:
        for mix in MIXES:
            for dtype in HALF if count > 2 else (bf16,):
                yield Case(mix, make_rows(mix, count, 128, dtype, device))
    for dtype in (*HALF, fp32):
        rows = make_rows("realistic", counts[-1], 128, dtype, device)
        yield Case("labels alone", replace(rows, identity_weight=0.0))
        yield Case("every argument", with_every_argument(rows))
        yield Case("temperature 0.01", replace(rows, temperature=0.01))
    for count in (256, 2050) if on_gpu else (256,):
        for dtype in (*HALF, fp32):
            for mass in CONVERGED_MASSES:
                yield Case("converged", nearly_converged(count, 128, dtype, device, mass), mass)
    if on_gpu and not quick:
        for dtype in HALF:
            yield Case("many rows", make_rows("realistic", 65_537, 128, dtype, device))


def entry_names(architecture: str) -> list[str]:
    """All that the tuning table holds for an architecture, as "bf16-128": a dtype and the widest rows of an entry."""
    widths: dict[int, set[int]] = {}
    for (of, _kernel, size), by_width in tuning.TILES.items():
        if of == architecture:
            widths.setdefault(size, set()).update(by_width)
    return [f"{dtype_name(d)}-{width}" for d in (*HALF, torch.float32) for width in sorted(widths.get(d.itemsize, ()))]


def entry_cases(name: str, counts: tuple[int, ...], device: torch.device) -> list[Case]:
    """Cases for one of :func:`entry_names`: every variant of its kernels, and rows near convergence."""
    dtype_named, _, width = name.partition("-")
    dtype = next(dtype for dtype in (*HALF, torch.float32) if dtype_name(dtype) == dtype_named)
    found = []
    for count in counts:
        drawn = make_rows("realistic", count, int(width), dtype, device)
        found += [
            Case("realistic", drawn),
            Case("every argument", with_every_argument(drawn)),
            Case("identity alone", replace(drawn, label_weight=0.0)),
            Case("temperature 0.01", replace(drawn, temperature=0.01)),
        ]
    mass = CONVERGED_MASSES[0]
    return [*found, Case("converged", nearly_converged(counts[0] // 2 * 2, int(width), dtype, device, mass), mass)]


class Evaluation(NamedTuple):
    """What one call gives; gradients N-fold, as a loss scaler would have them: float16 holds nothing below 6e-8."""

    loss: Tensor
    lse: Tensor
    gradient: Tensor
    temperature_gradient: Tensor


def evaluate(rows: Rows, implementation: str) -> Evaluation:
    """One call of the public function."""

    def call(rows: Rows) -> tuple[Tensor, Tensor]:
        out = mixed_contrastive_loss(**vars(rows), implementation=implementation)
        return out.loss, out.lse

    return _differentiate(rows, call)


def truth(rows: Rows) -> Evaluation:
    """What is right for the rows as their dtype has rounded them; ``lse`` is left out for many."""
    rows = replace(rows, embeddings=rows.embeddings.double())
    if len(rows) <= REFERENCE_ROWS:
        return evaluate(rows, "reference")
    return _differentiate(rows, lambda rows: (chunked(rows), torch.empty(0)))


def _differentiate(rows: Rows, call: Callable[[Rows], tuple[Tensor, Tensor]]) -> Evaluation:
    z = rows.embeddings.detach().requires_grad_()
    wide = torch.promote_types(z.dtype, torch.float32)
    temperature = torch.tensor(rows.temperature, dtype=wide, device=z.device, requires_grad=True)
    loss, lse = call(replace(rows, embeddings=z, temperature=temperature))
    scale = torch.full_like(loss, len(rows))
    return Evaluation(loss.detach(), lse, *torch.autograd.grad(loss, (z, temperature), scale))


def check(case: Case, implementation: str) -> dict:
    """The errors of one case, whether two runs gave the same bits, and whether all that passes."""
    want = truth(case.rows)
    first = evaluate(case.rows, implementation)
    poison_free_memory(case.rows.embeddings.device)
    second = evaluate(case.rows, implementation)
    errors = {
        "loss_error": relative_error(first.loss, want.loss, 1),
        "gradient_error": relative_error(first.gradient, want.gradient),
        "temperature_error": relative_error(first.temperature_gradient, want.temperature_gradient, len(case.rows)),
    }
    tolerance = GRADIENT_ERROR if case.mass is None else CONVERGED_ERROR
    allowed = dict(zip(errors, (LOSS_ERROR, tolerance, tolerance), strict=True))
    same_bits = all(map(torch.equal, first, second))
    passed = same_bits and all(errors[name] <= allowed[name] for name in errors)  # NaN is not
    return {**errors, "same_bits": same_bits, "passed": passed}


def describe(case: Case) -> dict:
    rows, width = case.rows.embeddings.shape
    dtype = dtype_name(case.rows.embeddings.dtype)
    return {"case": case.name, "rows": rows, "width": width, "dtype": dtype, "mass": case.mass}


def compare_baseline(baseline: Baseline, rows: Rows) -> dict:
    """The errors of a baseline, as those of :func:`check`; along the rows it may have no gradient."""
    want = truth(rows)
    leaf = rows.embeddings.detach().requires_grad_()
    loss = baseline.loss(replace(rows, embeddings=leaf))
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, len(rows)))
    gradients = gradient.double(), want.gradient
    if baseline.normalises:
        unit = normalize(leaf.detach().double(), dim=1)
        gradients = tuple(g - (g * unit).sum(1, keepdim=True) * unit for g in gradients)
    return {
        "loss_error": relative_error(loss, want.loss, 1),
        "gradient_error": relative_error(*gradients),
    }


def relative_error(value: Tensor, target: Tensor, least: float = 1e-12) -> float:
    """‖value − target‖ / ‖target‖, of ``least`` where the target is smaller."""
    value, target = value.detach().double(), target.detach()
    return float((value - target).norm() / target.norm().clamp(min=least))


def poison_free_memory(device: torch.device) -> None:
    """Leave NaN in the memory that the next call is likely to be handed, so that what it forgets to write shows."""
    sizes = [2**24, 2**22, *[2**18] * 8, *[2**10] * 32]
    blocks = [torch.full((size,), torch.nan, device=device) for size in sizes]
    del blocks


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
