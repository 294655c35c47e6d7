"""A table of few arms."""

from __future__ import annotations

from mixcl_dist.config import from_dict

STAGES = {
    "reconstruction": {"settings": {"objective.voxel_label": 0}},
    "identity": {},
    "mixcl": {"start": "identity", "labels": "budget"},
    "supervised": {"labels": "budget", "supervised": True},
    "known": {"start": "identity", "labels": "all"},
}


ARMS = {
    "scratch": {},
    "mixcl": {"stage": "mixcl"},
    "reconstruction": {"stage": "reconstruction"},
    "supervised": {"stage": "supervised"},
    "longer": {"voxels_of": "mixcl"},
}


def table(**changes):
    """A configuration with a table of two numbers of scans and two seeds."""
    section = {"scans": [1, 4], "seeds": [0, 1], "stages": STAGES, "arms": ARMS} | changes
    return from_dict({"table": section})
