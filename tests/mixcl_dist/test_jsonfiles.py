"""JSON files are written whole or not at all."""

from __future__ import annotations

import errno

import pytest

from mixcl_dist.data_shards.storage import publishing
from mixcl_dist.errors import RunError
from mixcl_dist.jsonfiles import append_line, write_atomic


@pytest.mark.parametrize("write", [write_atomic, lambda file, content: append_line(file, {"step": 1})])
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch, write):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomic(tmp_path / "old.json", b"old")
    monkeypatch.setattr(publishing.os, "fsync", full)
    monkeypatch.setattr("mixcl_dist.jsonfiles.json.dumps", full)
    with pytest.raises(RunError, match=r"old.json: No space left on device; make room there, .* give the command"):
        write(tmp_path / "old.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_bytes() == b"old"
