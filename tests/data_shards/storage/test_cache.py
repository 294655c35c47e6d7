"""The cache: each span is fetched once, never of another version, and never beyond its bound."""

from __future__ import annotations

import fcntl
import os
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mixcl_dist.data_shards.storage import open_store
from mixcl_dist.data_shards.storage.store import CacheConfig, MissingError, Span, StorageError

from .reading import CONTENT, SPAN, failure, read, replace


@pytest.fixture
def cache(tmp_path) -> CacheConfig:
    return CacheConfig(tmp_path / "cache", 1 << 20)


def entries(cache: CacheConfig) -> list[Path]:
    return [path for path in cache.folder.rglob("*") if path.is_file() and path.name != "used"]


def on_disk(cache: CacheConfig) -> int:
    """Bytes that the files take in blocks of 4 KiB, while nobody adds any."""
    with next(cache.folder.rglob("used")).open() as used:
        fcntl.flock(used, fcntl.LOCK_SH)
        return sum(-(-path.stat().st_size // 4096) * 4096 for path in entries(cache))


@pytest.mark.parametrize("where", ["", "/with-date"])
def test_a_span_is_fetched_once_for_all_processes(nginx, cache, where):
    spans = [SPAN, Span("a.tar", 100_000, 100_010)]
    expected = [CONTENT[s.start : s.end] for s in spans]
    store = open_store(f"{nginx.url}{where}", cache)
    assert read(store, *spans) == expected
    assert len(nginx.seen()) == 3
    assert read(store, *spans) == expected
    assert nginx.seen() == []
    assert read(pickle.loads(pickle.dumps(store)), *spans) == expected
    assert [line.split()[3] for line in nginx.seen()] == ["bytes=0-0"]


def test_s3_spans_are_kept_by_their_etag(s3, cache):
    assert read(open_store(s3, cache), SPAN) == read(open_store(s3, cache), SPAN) == [CONTENT[1000:5000]]
    assert len(entries(cache)) == 1


def test_a_replaced_file_is_not_served_from_the_cache(nginx, cache):
    read(open_store(nginx.url, cache), SPAN)
    replace(nginx.root / "a.tar", CONTENT[::-1][:-7])
    assert read(open_store(nginx.url, cache), SPAN) == [CONTENT[::-1][1000:5000]]


def test_a_file_replaced_under_a_running_job_is_noticed_with_the_next_answer_or_when_forgotten(nginx, cache):
    store, other = open_store(nginx.url, cache), Span("a.tar", 100_000, 100_010)
    read(store, SPAN)
    replace(nginx.root / "a.tar", CONTENT[::-1][:-7])
    assert read(store, SPAN) == [CONTENT[1000:5000]]
    assert read(store, other) == [CONTENT[::-1][100_000:100_010]]
    assert len(entries(cache)) == 1  # what is of two versions is not kept
    assert read(store, SPAN) == [CONTENT[::-1][1000:5000]]
    replace(nginx.root / "a.tar", CONTENT)
    assert read(store, SPAN) == [CONTENT[::-1][1000:5000]]
    store.forget(SPAN)
    assert read(store, SPAN) == [CONTENT[1000:5000]]


def test_nothing_is_kept_of_a_server_that_does_not_tell_versions_apart(nginx, cache):
    store = open_store(f"{nginx.url}/without-identity", cache)
    assert read(store, SPAN) == [CONTENT[1000:5000]]
    assert entries(cache) == []


def test_a_damaged_entry_is_dropped_by_forgetting_it(nginx, cache):
    store = open_store(nginx.url, cache)
    read(store, SPAN)
    (entry,) = entries(cache)
    entry.write_bytes(bytes(4000))
    assert read(store, SPAN) == [bytes(4000)]
    store.forget(SPAN)
    assert read(store, SPAN) == [CONTENT[1000:5000]]
    assert read(store, SPAN) == [CONTENT[1000:5000]]
    assert [line.split()[3] for line in nginx.seen()] == ["bytes=0-0", "bytes=1000-4999"] * 2


def test_an_entry_of_another_length_is_not_used(nginx, cache):
    store = open_store(nginx.url, cache)
    read(store, SPAN)
    (entry,) = entries(cache)
    entry.write_bytes(CONTENT[1000:4000])
    assert read(store, SPAN) == [CONTENT[1000:5000]]
    assert entry.read_bytes() == CONTENT[1000:5000]


def test_asking_beyond_the_end_leaves_the_file_as_known_as_before(nginx, cache):
    store = open_store(nginx.url, cache)
    assert "ends before byte" in str(failure(store, Span("a.tar", 400_000, 400_001)))
    read(store, SPAN)
    assert len(entries(cache)) == 1


def test_failures_are_answered_and_not_kept(proxy, cache):
    store = open_store(proxy.url, cache)
    for answers in ([403], ["", 403]):  # of the question for its version, of the bytes
        proxy.faults[:] = answers
        assert "access is refused" in str(failure(store))
    assert entries(cache) == []
    good, missing = store.read_spans([SPAN, Span("b.tar", 0, 1)])
    assert isinstance(good, memoryview) and isinstance(missing, MissingError)
    assert read(store, SPAN) == [CONTENT[1000:5000]]
    assert len(entries(cache)) == 1


def test_the_least_recently_used_makes_room(nginx, tmp_path):
    cache = CacheConfig(tmp_path, 5 * 4096)
    store = open_store(nginx.url, cache)
    spans = [Span("a.tar", n * 4096, (n + 1) * 4096) for n in range(6)]
    for span in [*spans[:4], spans[0], spans[4], spans[5]]:
        read(store, span)
        assert on_disk(cache) <= cache.max_bytes
    nginx.seen()
    read(store, spans[0], spans[5])
    assert nginx.seen() == []
    read(store, spans[1])
    assert len(nginx.seen()) == 1


def test_a_span_larger_than_the_cache_is_not_kept_and_displaces_nothing(nginx, tmp_path):
    cache = CacheConfig(tmp_path, 5 * 4096)
    store = open_store(nginx.url, cache)
    assert read(store, SPAN, Span("a.tar", 0, 200_000)) == [CONTENT[1000:5000], CONTENT[:200_000]]
    assert [entry.read_bytes() for entry in entries(cache)] == [CONTENT[1000:5000]]


def test_only_its_own_files_make_room(nginx, tmp_path):
    (tmp_path / "aa").mkdir()
    for bystander in (tmp_path / "thesis.tex", tmp_path / "aa" / "data"):
        bystander.write_bytes(CONTENT)
    store = open_store(nginx.url, CacheConfig(tmp_path, 3 * 4096))
    for n in range(10):
        read(store, Span("a.tar", n * 4096, (n + 1) * 4096))
    assert (tmp_path / "thesis.tex").read_bytes() == (tmp_path / "aa" / "data").read_bytes() == CONTENT


def test_a_lower_bound_and_what_killed_writers_left_are_cleared(nginx, tmp_path):
    read(open_store(nginx.url, CacheConfig(tmp_path, 1 << 20)), *(Span("a.tar", n, n + 4096) for n in range(50)))
    cache = CacheConfig(tmp_path, 4 * 4096)
    orphan = entries(cache)[0].with_name(".half.1234.tmp")
    orphan.write_bytes(bytes(4096))
    os.utime(orphan, (0, 0))
    read(open_store(nginx.url, cache), Span("a.tar", 100, 200))
    assert on_disk(cache) <= cache.max_bytes
    assert not orphan.exists()


def test_several_processes_share_a_cache_within_its_bound(nginx, tmp_path):
    cache = CacheConfig(tmp_path, 20 * 4096)
    script = f"""
        import pickle, random, sys
        from mixcl_dist.data_shards.storage.store import Span
        store = pickle.load(sys.stdin.buffer)
        content = open({str(nginx.root / "a.tar")!r}, "rb").read()
        for _ in range(60):
            spans = [Span("a.tar", 4096 * n, 4096 * n + 4000) for n in random.sample(range(40), 3)]
            for span, result in zip(spans, store.read_spans(spans)):
                assert bytes(result) == content[span.start : span.end], result
    """
    child = [sys.executable, "-c", textwrap.dedent(script)]
    children = [subprocess.Popen(child, stdin=subprocess.PIPE) for _ in range(3)]
    for process in children:
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(open_store(nginx.url, cache)))
        process.stdin.close()
    most = 0
    while any(process.poll() is None for process in children):
        time.sleep(0.01)
        if not list(tmp_path.rglob("used")):
            continue
        most = max(most, on_disk(cache))
    most = max(most, on_disk(cache))
    assert [process.returncode for process in children] == [0, 0, 0]
    assert 10 * 4096 < most <= cache.max_bytes


def test_a_full_disk_ends_caching_with_one_warning_and_nothing_else(nginx, tmp_path):
    script = """
        import pickle, sys
        from pathlib import Path
        from mixcl_dist.data_shards.storage.store import CacheConfig, Span
        from mixcl_dist.data_shards.storage import open_store
        url, folder, content = pickle.load(sys.stdin.buffer)
        store = open_store(url, CacheConfig(Path(folder), 1 << 30))
        for _ in range(2):
            for start in range(0, 300_000, 10_000):
                (result,) = store.read_spans([Span("a.tar", start, start + 10_000)])
                assert bytes(result) == content[start : start + 10_000]
        print(sum(path.is_file() for path in Path(folder).rglob("*")), list(Path(folder).rglob("*.tmp")))
    """
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=128k none "$0" && exec "$@"']
    if subprocess.run([*mount, tmp_path, "true"], capture_output=True).returncode:
        pytest.skip("no user name space to mount a small disk in; sysctl kernel.unprivileged_userns_clone=1")
    child = [*mount, tmp_path, sys.executable, "-c", textwrap.dedent(script)]
    sent = pickle.dumps((nginx.url, str(tmp_path), CONTENT))
    done = subprocess.run(child, input=sent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    files, left = done.stdout.decode().split(maxsplit=1)
    assert int(files) > 5 and left == "[]\n"
    assert done.stderr.decode().count("the cache keeps nothing more: No space left on device") == 1
    assert len(done.stderr.decode().splitlines()) == 1


def test_an_unusable_cache_is_refused(nginx, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file: cannot be made for the cache: Not a directory"):
        open_store(nginx.url, CacheConfig(tmp_path / "file", 1 << 20))
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        CacheConfig(tmp_path, 0)
