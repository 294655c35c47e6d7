"""What rounding rows to bfloat16 costs in accuracy: the loss, and the gradient that reaches the network.

    python benchmarks/kernel/rounding.py        seconds on a CPU

Training normalises the voxel head's output in float32 and rounds it for the kernels. Here the same is done to rows of
lengths around 1, the loss computed from them by the CPU path, and all compared with float64 throughout.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import inputs

from mixcl_dist.kernels import mixed_contrastive_loss

CPU = torch.device("cpu")


def loss_and_gradient(features: Tensor, rows: inputs.Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of (N, D) features that are normalised in their own dtype, then rounded to `dtype`."""
    features = features.detach().requires_grad_()
    rounded = normalize(features, dim=1).to(dtype)
    loss = mixed_contrastive_loss(**vars(replace(rows, embeddings=rounded))).loss
    (gradient,) = torch.autograd.grad(loss, features)
    return loss.detach().double(), gradient.double()


def errors(rows: inputs.Rows, dtype: torch.dtype) -> tuple[float, float]:
    """Relative errors of loss and gradient against float64, for float32 features that are rounded to `dtype`."""
    length = torch.rand(len(rows), 1, generator=torch.Generator().manual_seed(0)) + 0.5
    features = rows.embeddings * length
    exact = loss_and_gradient(features.double(), rows, torch.float64)
    got = loss_and_gradient(features, rows, dtype)
    loss, gradient = (float((a - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True))
    return loss, gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    options = parser.parse_args()
    cases = {
        "half-trained": inputs.make_rows("realistic", options.rows, 128, torch.float32, CPU),
        "mass 0.99": inputs.nearly_converged(options.rows, 128, torch.float32, CPU, 0.99),
    }
    print(f"{options.rows} rows of 128 features; relative error against float64 on the same features")
    print(f"{'rows':>14} {'given as':>10} {'loss':>9} {'gradient':>9}")
    for name, rows in cases.items():
        for dtype in (torch.float32, torch.bfloat16):
            loss, gradient = errors(rows, dtype)
            print(f"{name:>14} {str(dtype).removeprefix('torch.'):>10} {loss:9.1e} {gradient:9.1e}")


if __name__ == "__main__":
    main()
