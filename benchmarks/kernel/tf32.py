"""What TF32 products cost in accuracy: the loss and its gradient with products rounded as tensor cores round them.

    python benchmarks/kernel/tf32.py        seconds on a CPU; no GPU is needed, as the rounding is emulated in float64

A TF32 number keeps 10 bits after the leading one. "tf32" multiplies rows rounded so; "tf32x3", which the kernels use
for float32 rows, splits each number into two TF32 numbers and leaves out the product of the small parts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import inputs


def tf32(values: Tensor) -> Tensor:
    """The nearest TF32 number of float32 values held in float64."""
    bits = values.float().view(torch.int32)
    return ((bits + 0x0FFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32).double()


def product(left: Tensor, right: Tensor, precision: str) -> Tensor:
    """left · right with exact sums, as float32 products, TF32 products or three TF32 products of each pair."""
    left, right = left.float().double(), right.float().double()
    if precision == "fp32":
        return left @ right
    left_high, right_high = tf32(left), tf32(right)
    if precision == "tf32":
        return left_high @ right_high
    return left_high @ right_high + left_high @ tf32(right - right_high) + tf32(left - left_high) @ right_high


def infonce(z: Tensor, twin: Tensor, temperature: float, multiply: Callable) -> tuple[Tensor, Tensor]:
    """Mean InfoNCE loss of (N, D) rows and its gradient, by the formulas of kernels/README.md."""
    s = (multiply(z, z.T) / temperature).fill_diagonal_(-torch.inf)
    softmax = s.softmax(1)
    positive = torch.zeros_like(s)
    positive[torch.arange(len(z)), twin] = 1
    weight = (softmax - positive) / len(z)
    loss = (s.logsumexp(1) - s.gather(1, twin[:, None])[:, 0]).mean()
    return loss, multiply(weight + weight.T, z) / temperature


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    options = parser.parse_args()
    print(f"InfoNCE, {options.rows} rows of 128 features; relative error against float64 on the same float32 rows")
    print(f"{'rows':>14} {'precision':>10} {'loss':>9} {'gradient':>9}")
    half = inputs.make_rows("unlabelled", options.rows, 128, torch.float32, torch.device("cpu"))
    near = inputs.nearly_converged(options.rows, 128, torch.float32, torch.device("cpu"), 0.99)
    for name, rows in (("half-trained", half), ("mass 0.99", near)):
        z = rows.embeddings.float().double()
        twin = (rows.identity[:, None] == rows.identity).fill_diagonal_(False).int().argmax(1)
        exact = infonce(z, twin, float(rows.temperature), lambda left, right: left @ right)
        for precision in ("fp32", "tf32x3", "tf32"):
            got = infonce(z, twin, float(rows.temperature), lambda left, right, p=precision: product(left, right, p))
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]
            print(f"{name:>14} {precision:>10} {errors[0]:9.1e} {errors[1]:9.1e}")


if __name__ == "__main__":
    main()
