"""Publishing: files appear whole or not at all, also under a killed writer, and a lock is one process's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from mixcl_dist.data_shards.storage.publishing import exclusive, publish, remove_unpublished


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs `script`, and has printed its first line."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_file_appears_with_its_last_byte_and_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"old")
    with publish(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_writer_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), publish(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_disk_before_it_has_its_name_and_its_name_is_on_disk_at_the_end(tmp_path, monkeypatch):
    """Otherwise a power cut can leave the name of a file without its bytes."""
    order, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: order.append((os.readlink(f"/proc/self/fd/{fd}"), seen())) or fsync(fd))

    def seen() -> bool:
        return (tmp_path / "a.tar").exists()

    with publish(tmp_path / "a.tar") as file:
        file.write(b"new")
        temporary = file.name
    assert order == [(temporary, False), (str(tmp_path), True)]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "a.tar"
    writer = start(
        """
        import sys, time
        from pathlib import Path
        from mixcl_dist.data_shards.storage.publishing import publish
        with publish(Path(sys.argv[1])) as file:
            file.write(b"half of the n")
            file.flush()
            print("ready", flush=True)
            time.sleep(60)
        """,
        path,
    )
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    others = {tmp_path / "deep" / name for name in ("b.tar", ".hidden", "mine.tmp")}
    for other in others:
        other.touch()
    assert not path.exists() and len(list(path.parent.iterdir())) == 4
    remove_unpublished(tmp_path)
    assert set(path.parent.iterdir()) == others


def test_a_lock_is_one_processs_and_ends_with_it(tmp_path):
    lock = tmp_path / "lock"
    holder = start(
        """
        import sys, time
        from pathlib import Path
        from mixcl_dist.data_shards.storage.publishing import exclusive
        with exclusive(Path(sys.argv[1])):
            print("ready", flush=True)
            time.sleep(60)
        """,
        lock,
    )
    with pytest.raises(BlockingIOError), exclusive(lock):
        raise AssertionError("it was not held")
    holder.kill()
    holder.wait()
    with exclusive(lock):
        pass
