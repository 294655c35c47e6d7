"""What one run of a benchmark leaves: its figures with every sample, and all that they depend on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import ClassVar, Literal

from mixcl_dist import __version__
from mixcl_dist.cluster.installation import code_digest
from mixcl_dist.data_shards.versions import versions_of
from mixcl_dist.records import Length, Record
from mixcl_dist.run import machine

ROOT = Path(__file__).resolve().parents[2]
"""Of the checkout, where this package lies in one."""
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
    """Of a checkout, with a plus where files differ from it; of an installed package its version and code."""
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
    MISSING: ClassVar[str] = "measure first, with --out"

    benchmark: str
    command: tuple[str, ...]
    quick: bool = False
    """Smallest sizes: it shows that all works here, and is no figure to quote."""
    environment: Environment
    conditions: dict[str, str] = field(default_factory=dict)
    """What the figures depend on beside code and machine: settings by name, the shards' digest."""
    figures: Mapping[str, Figure]
    said: str = ""
    """A sentence for people."""


def environment() -> Environment:
    """This machine, now."""
    here = machine()
    return Environment(
        machine=f"{here.cpu}, {here.cores} cores",
        card=here.gpu,
        python=platform.python_version(),
        versions=versions_of(PACKAGES),
        commit=_commit(),
        clock_mhz=_clock_mhz(),
        load_before=os.getloadavg()[0],
        begun=datetime.now().astimezone().isoformat(timespec="seconds"),
        variables={name: value for name, value in sorted(os.environ.items()) if name.endswith("_NUM_THREADS")},
    )


def ended(before: Environment) -> Environment:
    """The same machine, after the measurement."""
    return replace(before, load_after=os.getloadavg()[0])


def _clock_mhz() -> float | None:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")), None)


def _commit() -> str:
    if not (ROOT / ".git").exists():
        return f"{__version__}, code {code_digest()}"
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return f"{head.stdout.strip() or 'unknown'}{'+' if changed.stdout.strip() else ''}"
