"""Folders: open files are few, closed in the end, and never those of yesterday."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from mixcl_dist.data_shards.storage import open_store
from mixcl_dist.data_shards.storage.store import MissingError, Span

from .reading import CONTENT, SPAN, failure, read, replace


def test_a_file_that_took_the_place_of_an_open_one_is_read(folder):
    store = open_store(folder)
    read(store, SPAN)
    replace(folder / "a.tar", CONTENT[::-1])
    assert read(store, SPAN) == [CONTENT[::-1][1000:5000]]
    (folder / "a.tar").unlink()
    assert isinstance(failure(store), MissingError)


def test_a_file_cut_off_while_open_is_noticed(folder):
    store = open_store(folder)
    read(store, SPAN)
    os.truncate(folder / "a.tar", 4999)
    assert "a.tar: ends before byte 5000, cut off or replaced; copy it again" in str(failure(store))
    assert read(store, Span("a.tar", 1000, 4999)) == [CONTENT[1000:4999]]


def test_a_span_larger_than_memory_is_refused_before_any_is_taken(folder):
    assert "ends before byte" in str(failure(open_store(folder), Span("a.tar", 0, 1 << 60)))


def test_a_folder_in_place_of_a_file_is_refused(folder):
    (folder / "b.tar").mkdir()
    assert "b.tar: Is a directory" in str(failure(open_store(folder), Span("b.tar", 0, 1)))


def open_in(folder):
    """How many files of a folder this process has open; others may be closed at any time, as garbage is collected."""
    paths = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
    return sum(path.is_relative_to(folder.resolve()) for path in paths)


def test_few_files_are_open_at_a_time_and_none_afterwards(folder):
    spans = [Span(f"{n}.tar", 0, 4) for n in range(300)]
    for span in spans:
        (folder / span.file).write_bytes(b"%4d" % int(span.file[:-4]))
    store = open_store(folder)
    for _ in range(2):
        assert read(store, *spans) == [b"%4d" % n for n in range(300)]
    assert 0 < open_in(folder) <= 64
    del store
    assert open_in(folder) == 0


def test_threads_share_a_folder_of_more_files_than_stay_open(folder):
    spans = [Span(f"{n}.tar", 0, 4) for n in range(150)]
    for span in spans:
        (folder / span.file).write_bytes(b"%4d" % int(span.file[:-4]))
    store, found = open_store(folder), []
    threads = [threading.Thread(target=lambda: found.extend(read(store, *spans))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"%4d" % n for n in range(150)] * 8


def test_neighbouring_spans_are_views_of_one_read(folder, monkeypatch):
    reads, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *args: reads.append(args[1:]) or pread(*args))
    first, second = open_store(folder).read_spans([Span("a.tar", 9000, 9500), Span("a.tar", 512, 8000)])
    assert isinstance(first, memoryview) and isinstance(second, memoryview)
    assert first.obj is second.obj
    assert reads == [(9500 - 512, 512)]
