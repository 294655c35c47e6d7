"""What is built and how; the configuration imports this, so it imports nothing heavy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pydantic.dataclasses
from pydantic import ConfigDict, Field

from mixcl_dist.data_shards.errors import DataError

Progress = Callable[[int, int, str], None]
"""Called with how many are done, of how many, and of what ("case" or "shard")."""


Edge = Annotated[int, Field(ge=1, le=4096, strict=True)]
SpacingMm = Annotated[float, Field(gt=0, le=1000)]


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True))
class BuildConfig:
    """How volumes are cut into patches and written as shards."""

    patch_size: tuple[Edge, Edge, Edge] = (48, 48, 48)
    """Voxels of a stored patch."""
    spacing_mm: tuple[SpacingMm, SpacingMm, SpacingMm] | None = None
    """Spacing in mm that every volume is resampled to; None keeps each volume's own."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Smallest share of a patch's edge that it has in common with its neighbour."""
    min_body_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Patches with a smaller share of voxels above -500 HU are skipped as air."""
    body_margin_mm: Annotated[float, Field(ge=0, le=1000)] = 10.0
    """Air in mm kept around the body when a volume is cropped to it."""
    samples_per_shard: Annotated[int, Field(ge=1, le=10**6, strict=True)] = 256
    """Patches of a shard; the last one may hold fewer."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1, strict=True)] = 0
    """Number that the shuffle over all volumes' patches follows from."""
    splits: Annotated[tuple[Literal["training", "validation", "unlabelled"], ...], Field(min_length=1)] = (
        "training",
        "unlabelled",
    )
    """Which cases enter the shards; validation cases stay out, so that pre-training never sees them."""
    codec: Literal["fast", "small"] = "fast"
    """How HU are stored: LZ4HC, or pcodec, which takes a sixth less and decodes at a fifth of the speed."""
    quantise_hu: Annotated[int, Field(ge=0, le=100, strict=True)] = 0
    """Step in HU that values are rounded to, each by at most half of it, counted from air; 0 loses nothing."""
    workers: Annotated[int, Field(ge=1, le=1024, strict=True)] = 1
    """Processes that read cases side by side; the shards do not depend on it."""

    def recorded(self) -> dict[str, Any]:
        """What the shards depend on, as JSON has it."""
        settings = dataclasses.asdict(self)
        del settings["workers"]
        return json.loads(json.dumps(settings))


class BuildError(DataError):
    """A build that cannot begin or go on; the message is one line with the cure."""
