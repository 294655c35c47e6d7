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


WORKER = """
import json, os, pathlib, sys, time
out, name = pathlib.Path(sys.argv[1]), sys.argv[2]
item = next(i for i in json.loads((out / "plan.json").read_text())["items"] if i["name"] == name)
kind, stage = item["kind"], name.partition("/")[2].partition("-")[0]
run = out / ((kind == "probe" and item["start"]) or name)
run.mkdir(parents=True, exist_ok=True)
with (out / "order").open("a") as file:
    file.write(name + "\\n")
probe = {"linear": {"mean": 0.5 if stage == "mixcl" else 0.3, "dice": {}}, "knn": {"mean": 0.2, "dice": {}}}
probe["scans"] = {"fitted": 1, "judged": 1}
"""


FINISH = """
result = {"probe": ("probe.json", probe), "pretrain": ("network.safetensors", {})}
file, content = result.get(kind, ("dice.json", {"mean": 0.6, "classes": [], "cases": {}, "class_mean": {}}))
(run / file).write_text(json.dumps(content))
"""
"""What stands for the process of an item, up to its result, and the rest."""
