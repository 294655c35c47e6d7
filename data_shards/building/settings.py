"""What is built and how; the configuration imports this, so it imports nothing heavy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Progress = Callable[[int, int, str], None]
"""Called with how many are done, of how many, and of what ("case" or "shard")."""


@dataclass(frozen=True)
class BuildConfig:
    """How volumes are cut into patches and written as shards."""

    patch_size: tuple[int, int, int] = (48, 48, 48)
    """Voxels of a stored patch."""
    spacing_mm: tuple[float, float, float] | None = None
    """Spacing that every volume is resampled to; None keeps each volume's own."""
    overlap: float = 0.25
    """Smallest share of a patch's edge that it has in common with its neighbour."""
    min_body_fraction: float = 0.05
    """Patches with a smaller share of voxels above -500 HU are skipped as air."""
    body_margin_mm: float = 10.0
    """Air kept around the body when a volume is cropped to it."""
    samples_per_shard: int = 256
    seed: int = 0
    """Of the shuffle over all volumes' patches."""
    splits: tuple[Literal["training", "validation", "unlabelled"], ...] = ("training", "unlabelled")
    """Which cases enter the shards; validation cases stay out, so that pre-training never sees them."""
    codec: Literal["fast", "small"] = "fast"
    """How HU are stored: LZ4HC, or pcodec, which takes a sixth less and decodes at a fifth of the speed."""
    quantise_hu: int = 0
    """Step in HU that values are rounded to, each by at most half of it, counted from air; 0 loses nothing."""
    workers: int = 1
    """Processes that read cases side by side; the shards do not depend on it."""

    def __post_init__(self) -> None:
        checks = {
            "patch_size": min(self.patch_size) >= 1,
            "spacing_mm": self.spacing_mm is None or min(self.spacing_mm) > 0,
            "overlap": 0 <= self.overlap < 1,
            "min_body_fraction": 0 <= self.min_body_fraction <= 1,
            "body_margin_mm": self.body_margin_mm >= 0,
            "samples_per_shard": self.samples_per_shard >= 1,
            "splits": len(self.splits) >= 1,
            "codec": self.codec in ("fast", "small"),
            "quantise_hu": 0 <= self.quantise_hu <= 100,
            "workers": self.workers >= 1,
        }
        for name, holds in checks.items():
            if not holds:
                raise ValueError(f"build.{name} = {getattr(self, name)} is out of range")

    def recorded(self) -> dict[str, Any]:
        """What the shards depend on, as JSON has it."""
        settings = dataclasses.asdict(self)
        del settings["workers"]
        return json.loads(json.dumps(settings))


class BuildError(ValueError):
    """A build that cannot begin or go on; the message is one line with the cure."""
