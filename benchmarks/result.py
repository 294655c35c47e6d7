"""What one run of a benchmark leaves: its figures with every sample, and all that they depend on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, Literal

from mixcl_dist.records import Length, Record

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "scipy", "blosc2", "webdataset", "monai", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One thing that was measured."""

    unit: str
    better: Literal["more", "less"]
    samples: tuple[float, ...]
    """As they came, one a round; a count has one."""
    exact: bool = False
    """Whether it is a count, in which any growth is one."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where and when; two results of other machines are no comparison."""

    machine: str
    card: str | None = None
    python: str
    versions: dict[str, str]
    commit: str
    clock_mhz: Length | None = None
    load_before: Length
    load_after: Length | None = None
    begun: str
    variables: dict[str, str] = field(default_factory=dict)
    """Of the environment, those that decide how many threads there are."""


@dataclass(frozen=True, kw_only=True)
class Result(Record):
    """A benchmark's figures by name."""

    FILE: ClassVar[str] = "result.json"
    CURE: ClassVar[str] = "measure again"

    benchmark: str
    command: tuple[str, ...]
    quick: bool = False
    """Smallest sizes: it shows that all works here, and is no figure to quote."""
    environment: Environment
    figures: Mapping[str, Figure]
    said: str = ""
    """A sentence for people."""


def environment() -> Environment:
    """This machine, now."""
    model, clock = "unknown CPU", None
    if Path("/proc/cpuinfo").exists():
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        told = {key.strip(): value.strip() for key, _, value in lines}
        model, clock = told.get("model name", model), float(told.get("cpu MHz", 0)) or None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Environment(
        machine=f"{model}, {cores} cores",
        card=_card(),
        python=platform.python_version(),
        versions={name: found for name in PACKAGES if (found := _version(name))},
        commit=_commit(),
        clock_mhz=clock,
        load_before=os.getloadavg()[0],
        begun=datetime.now().astimezone().isoformat(timespec="seconds"),
        variables={name: value for name, value in sorted(os.environ.items()) if name.endswith("_NUM_THREADS")},
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _card() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _commit() -> str:
    """Of the checkout, with a plus where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return f"{head.stdout.strip() or 'unknown'}{'+' if changed.stdout.strip() else ''}"
