"""Shards: drawn over all volumes, each whole with its index, also after a full disk."""

from __future__ import annotations

import errno
import itertools
import os

import numpy as np
import pytest

from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.building.settings import BuildError
from mixcl_dist.data_shards.format.shard import index_path, verify_shard

from .reading import published, samples_of


def test_neighbours_in_a_shard_come_from_different_volumes(built):
    cases = [sample["case"] for sample in samples_of(built)]
    together = np.mean([one == next_ for one, next_ in itertools.pairwise(cases)])
    assert together < 0.5, "five volumes in order would give more than 0.8"


def test_a_full_disk_ends_in_one_line_and_the_build_goes_on_when_there_is_room(
    cohort, small_config, tmp_path, monkeypatch
):
    source, out = cohort("a", "b", "c"), tmp_path / "out"
    build([source], tmp_path / "whole", small_config)
    sync, calls = os.fsync, []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", full)  # in this process, so while shards are written
    with pytest.raises(BuildError) as refused:
        build([source], out, small_config)
    assert (
        str(refused.value) == f"{out}: No space left on device; free space there and build again: what is done is kept"
    )
    assert not (out / "manifest.json").exists() and not list(out.glob(".*.tmp"))
    assert list(out.glob("shard-*.tar")), "it failed in the middle"
    build([source], out, small_config)
    assert published(out) == published(tmp_path / "whole")


def test_indices_lie_beside_shards_and_each_shard_is_whole(built):
    for path in built.glob("*.tar"):
        assert index_path(path).exists() and verify_shard(path) == []
