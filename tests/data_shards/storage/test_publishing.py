"""Publishing: files appear whole or not at all, also under a killed writer, and a lock is one process's."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mixcl_dist.data_shards.storage.publishing import HeldError, exclusive, publish, remove_unpublished


@contextmanager
def ready(script: str, *arguments: object) -> Iterator[None]:
    """While a process runs `script` and has printed that it is ready; then it is killed."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield
        process.kill()


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
    half_a_file = """
        import sys, time
        from pathlib import Path
        from mixcl_dist.data_shards.storage.publishing import publish
        with publish(Path(sys.argv[1])) as file:
            file.write(b"half of the n")
            file.flush()
            print("ready", flush=True)
            time.sleep(60)
    """
    with ready(half_a_file, path):
        pass
    others = {tmp_path / "deep" / name for name in ("b.tar", ".hidden", "mine.tmp")}
    for other in others:
        other.touch()
    assert not path.exists() and len(list(path.parent.iterdir())) == 4
    remove_unpublished(tmp_path)
    assert set(path.parent.iterdir()) == others


def test_a_lock_is_one_processs_and_ends_with_it(tmp_path):
    lock = tmp_path / "lock"
    held = """
        import sys, time
        from pathlib import Path
        from mixcl_dist.data_shards.storage.publishing import exclusive
        with exclusive(Path(sys.argv[1])):
            print("ready", flush=True)
            time.sleep(60)
    """
    with ready(held, lock), pytest.raises(HeldError), exclusive(lock):
        raise AssertionError("it was not held")
    with exclusive(lock):
        pass


def test_a_held_lock_names_its_process_and_is_gone_afterwards(tmp_path):
    path = tmp_path / "lock"
    with exclusive(path):
        assert path.read_text() == f"{os.uname().nodename} {os.getpid()}"
        with (
            pytest.raises(HeldError, match=f"process {os.getpid()} of machine .* is working here; wait"),
            exclusive(path),
        ):
            pass
    assert not path.exists()


def test_what_a_killed_process_left_is_taken_over_with_one_line(tmp_path):
    path = tmp_path / "lock"
    program = f"""
import time
from pathlib import Path
from mixcl_dist.data_shards.storage.publishing import exclusive
with exclusive(Path({str(path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(HeldError, match=f"process {process.pid} "), exclusive(path):
        pass
    process.kill()
    process.wait()
    lines = []
    with exclusive(path, lines.append):
        assert path.read_text().endswith(f" {os.getpid()}")
    assert len(lines) == 1 and f"process {process.pid} was ended while it worked here" in lines[0]


def test_a_process_of_another_machine_is_believed_and_the_cure_works(tmp_path):
    path = tmp_path / "lock"
    path.write_text("elsewhere 12")
    with pytest.raises(HeldError, match=rf"process 12 of machine elsewhere .* delete {path}"), exclusive(path):
        pass
    path.unlink()
    with exclusive(path):
        pass


def test_what_a_job_left_on_another_machine_the_same_job_takes_over(tmp_path):
    """As SLURM starts a job anew when its first machine is lost."""
    path, lines = tmp_path / "lock", []
    path.write_text("elsewhere 12 slurm-4711")
    for other in ("", "slurm-4712"):
        with pytest.raises(HeldError, match="process 12 of machine elsewhere"), exclusive(path, job=other):
            pass
    with exclusive(path, lines.append, job="slurm-4711"):
        assert path.read_text().endswith(f" {os.getpid()} slurm-4711")
        with pytest.raises(HeldError, match="wait for it"), exclusive(path):
            pass
    assert len(lines) == 1 and "process 12 was ended while it worked here" in lines[0]


@pytest.mark.parametrize("content", ["", "garbage", "a b c", "\x00\xff"])
def test_a_lock_file_that_says_nothing_is_held_by_nobody(tmp_path, content):
    path = tmp_path / "lock"
    path.write_text(content)
    with exclusive(path):
        pass


def test_on_a_file_system_without_locks_the_process_is_looked_for(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    path = tmp_path / "lock"
    living = os.getppid()
    path.write_text(f"{os.uname().nodename} {living}")
    with pytest.raises(HeldError, match=f"process {living} of this machine"), exclusive(path):
        pass
    path.write_text(f"{os.uname().nodename} {2**22 + 1}")
    lines = []
    with exclusive(path, lines.append):
        assert len(lines) == 1
