"""A read rate is that of bytes that were read."""

from __future__ import annotations

import shutil

import pytest

from mixcl_dist.data_shards.inspection import rate
from mixcl_dist.data_shards.storage.folder import FolderStore
from mixcl_dist.data_shards.storage.store import StorageError


def test_the_rate_is_all_bytes_over_the_time_that_they_took(built, monkeypatch):
    clock = iter([10.0, *[11.0] * 1000])
    monkeypatch.setattr(rate.time, "monotonic", lambda: next(clock))
    assert rate.read_rate(built) == sum(path.stat().st_size for path in built.glob("*.tar"))


def test_readers_begin_in_different_places(built, monkeypatch):
    asked = []
    read = FolderStore.read_spans
    monkeypatch.setattr(FolderStore, "read_spans", lambda store, spans: asked.append(spans[0]) or read(store, spans))
    monkeypatch.setattr(rate, "READ_BYTES", 2**12)
    for part in range(3):
        rate.read_rate(built, part=part, parts=3, seconds=0)
    assert len(set(asked)) == 3


def test_a_shard_that_cannot_be_read_is_named(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "shards")
    next(copy.glob("*.tar")).write_bytes(b"")
    with pytest.raises(StorageError, match=r"shard-\d+\.tar: ends before byte"):
        rate.read_rate(copy)
