"""What is refused of a stream can be mended as its message says: each cure is followed here."""

from __future__ import annotations

import re

import pytest

from mixcl_dist.data_shards.inspection.summary import inspect, table
from mixcl_dist.data_shards.streaming.stream import Mixture, PatchStream, StreamError

FAULTS = {
    "batch and ranks": (
        {"batch_size": 4, "world_size": 3}, r"give a multiple of (\d+)$", lambda least: {"batch_size": int(least)}
    ),
    "class": ({"label_classes": ["x"]}, "has no class x; choose among (core)$", lambda name: {"label_classes": [name]}),
    "data set": (
        {"mixture": Mixture(upsampling={"x": 2.0})}, "no data set x; choose among (.*)$",
        lambda name: {"mixture": Mixture(upsampling={name: 2.0})},
    ),
    "share": (
        {"batch_size": 7, "mixture": Mixture(labelled_fraction=0.5)}, "the nearest is (.*)$",
        lambda share: {"mixture": Mixture(labelled_fraction=float(share))},
    ),
    "batch too large": ({"batch_size": 10**6}, "lower the batch size", lambda _: {"batch_size": 4}),
    "labels of nobody": (
        {"label_cases": [], "mixture": Mixture(labelled_fraction=0.5)}, "or change data.labelled_fraction",
        lambda _: {"mixture": Mixture(labelled_fraction=0.0)},
    ),
}  # fmt: skip


def opened(shards, given):
    return PatchStream(shards, **{"batch_size": 4, "seed": 0, "workers": 0, "label_cases": ["a", "b"]} | given)


@pytest.mark.parametrize("name", FAULTS)
def test_the_cure_that_is_said_helps(name, built):
    given, said, cured = FAULTS[name]
    with pytest.raises(StreamError) as error:
        opened(built, given)
    found = re.search(said, str(error.value))
    assert found and "\n" not in str(error.value), str(error.value)
    opened(built, given | cured(found[1] if found.groups() else ""))


def test_a_case_that_is_not_there_is_found_where_the_message_says(built):
    with pytest.raises(StreamError, match="has no case x; `mixcl shards inspect` lists what it holds"):
        opened(built, {"label_cases": ["x"]})
    assert "5 cases" in table(inspect(built))
