"""What is measured, in the order of its worth: a run that is cut short has the most important figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from baselines import BASELINES
from inputs import MIXES
from report import CPU_ROWS, DENSE_EAGER, LARGEST, ROWS, WIDTH

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
PAIR = ("realistic", "infonce")  #: the ratio of these two is what masking costs
RATE = {"cuda": 3e14, "cpu": 5e10}  #: FLOP/s, for the guess of the time that is left


class Block(NamedTuple):
    """Mixes that are timed in one loop; where they do not fit, with half the rows, and so on."""

    rows: int
    width: int
    dtype: torch.dtype
    mixes: tuple[str, ...] = PAIR
    halve: bool = True


class Contest(NamedTuple):
    """A baseline and the kernel in one loop; likewise, unless ``halve`` is off."""

    baseline: str
    rows: int
    width: int
    dtype: torch.dtype
    halve: bool = True


class Large(NamedTuple):
    """One forward and backward in a process of its own, for its time and peak memory."""

    rows: int
    width: int


@dataclass(frozen=True)
class Plan:
    steps: list[Block | Contest | Large]
    seconds: float  #: of measuring in one loop
    check_rows: int  #: where a baseline is compared with the reference

    def guess(self, step: Block | Contest | Large, device_type: str) -> float:
        """About how many seconds a step takes."""
        runs = {Block: 6 * len(getattr(step, "mixes", ())), Contest: 40, Large: 1}[type(step)]
        return 2 * self.seconds + 2 + runs * 6 * step.rows**2 * step.width / RATE[device_type]


def make_plan(device_type: str, quick: bool) -> Plan:
    if device_type == "cuda":
        return _quick_gpu() if quick else _gpu()
    return _quick_cpu() if quick else _cpu()


def _gpu() -> Plan:
    half = FP16, BF16
    contests = {b.name: Contest(b.name, ROWS, WIDTH, BF16) for b in BASELINES}
    foreign = [b.name for b in BASELINES if b.needs or b.cuda_only]
    steps: list = [Block(ROWS, WIDTH, dtype, tuple(MIXES)) for dtype in half]
    steps += [contest for name, contest in contests.items() if name not in foreign]
    steps += [Block(LARGEST, WIDTH, BF16, PAIR[:1])]
    steps += [Block(ROWS, width, dtype) for width in (64, 192, 256, 768) for dtype in half]
    steps += [Block(rows, WIDTH, dtype) for rows in (4096, 16_384, ROWS + 1, 262_144) for dtype in half]
    steps += [Block(ROWS, WIDTH, FP32)]
    steps += [contests[name] for name in foreign]
    return Plan(steps, seconds=1.5, check_rows=2048)


def _quick_gpu() -> Plan:
    steps: list = [Block(4096, WIDTH, dtype, tuple(MIXES)) for dtype in (FP16, BF16)]
    steps += [Contest(baseline.name, 8192, WIDTH, BF16) for baseline in BASELINES]
    return Plan(steps, seconds=0.3, check_rows=2048)


def _cpu() -> Plan:
    sizes = (512, 1024, 2048, 4096, 8192, 16_384)
    steps: list = [Block(rows, WIDTH, FP32, tuple(MIXES) if rows <= 4096 else PAIR) for rows in sizes]
    steps += [Contest(name, rows, WIDTH, FP32, halve=False) for rows in sizes for name in DENSE_EAGER]
    steps += [Large(CPU_ROWS, WIDTH)]
    steps += [Contest(b.name, 4096, WIDTH, FP32) for b in BASELINES if b.name not in DENSE_EAGER]
    return Plan(steps, seconds=1.5, check_rows=1024)


def _quick_cpu() -> Plan:
    steps: list = [Block(512, 64, FP32, tuple(MIXES)), Block(1025, 64, FP32)]
    steps += [Contest(baseline.name, 512, 64, FP32) for baseline in BASELINES]
    steps += [Large(4096, 64)]
    return Plan(steps, seconds=0.2, check_rows=256)
