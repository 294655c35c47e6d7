"""Any store: the bytes that lie there or one clear line, and how it is opened."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixcl_dist.data_shards.storage import open_store
from mixcl_dist.data_shards.storage.store import MissingError, Span, StorageError, Store

from .. import servers
from .reading import CONTENT, SPAN, bytes_of, failure, read, replace


def test_any_store_gives_files_whole_and_by_spans(anywhere):
    assert anywhere.read("a.tar") == CONTENT
    assert read(anywhere, SPAN, Span("a.tar", 299_999, 300_000)) == [CONTENT[1000:5000], CONTENT[-1:]]


def test_any_store_names_the_file_that_is_missing(anywhere):
    with pytest.raises(MissingError, match=r"b\.tar: is missing"):
        anywhere.read("b.tar")
    assert isinstance(failure(anywhere, Span("b.tar", 0, 1)), MissingError)


def test_a_bad_span_does_not_lose_the_others(anywhere):
    spans = [SPAN, Span("b.tar", 0, 9), Span("a.tar", 299_990, 300_001), Span("a.tar", 299_990, 300_000), SPAN]
    good, missing, beyond, last, again = anywhere.read_spans(spans)
    assert [bytes(good), bytes(last), bytes(again)] == [CONTENT[1000:5000], CONTENT[-10:], CONTENT[1000:5000]]
    assert "b.tar: is missing" in str(missing)
    assert "a.tar: ends before byte 300001" in str(beyond)


def test_names_with_any_characters_are_found(nginx, s3):
    import boto3

    name = "sub folder/Ä #1 100%25?.tar"
    (nginx.root / "sub folder").mkdir()
    (nginx.root / name).write_bytes(CONTENT)
    boto3.client("s3").put_object(Bucket=servers.BUCKET, Key=f"set/{name}", Body=CONTENT)
    for store in (open_store(nginx.root), open_store(nginx.url), open_store(s3)):
        assert store.read(name) == CONTENT
        assert read(store, Span(name, 1000, 5000)) == [CONTENT[1000:5000]]


def test_an_empty_file_is_empty(nginx, s3):
    import boto3

    (nginx.root / "b.tar").touch()
    boto3.client("s3").put_object(Bucket=servers.BUCKET, Key="set/b.tar", Body=b"")
    for store in (open_store(nginx.root), open_store(nginx.url), open_store(s3)):
        assert store.read("b.tar") == b""
        assert "b.tar: ends before byte 1," in str(failure(store, Span("b.tar", 0, 1)))


@pytest.mark.parametrize("name", ["../a.tar", "/etc/hostname", "x/../../a.tar", "", "a\0.tar"])
def test_names_that_lead_out_of_the_store_are_refused(anywhere, name):
    with pytest.raises(StorageError, match="is not the name of a file in it"):
        anywhere.read(name)
    (result,) = anywhere.read_spans([Span(name, 0, 1)])
    assert "is not the name of a file in it" in str(result)


@pytest.mark.parametrize("span", [Span("a.tar", -1, 1), Span("a.tar", 5, 4)])
def test_spans_that_cannot_be_are_refused(folder, span):
    assert "cannot have bytes" in str(failure(open_store(folder), span))


def test_a_store_goes_to_a_spawned_process(anywhere):
    bytes_of(anywhere.read_spans([SPAN]))
    script = """
        import pickle, sys
        store, span = pickle.load(sys.stdin.buffer)
        sys.stdout.buffer.write(store.read_spans([span])[0])
    """
    child = [sys.executable, "-c", textwrap.dedent(script)]
    sent = pickle.dumps((anywhere, SPAN))
    assert subprocess.run(child, input=sent, capture_output=True, check=True).stdout == CONTENT[1000:5000]


def test_a_store_in_use_goes_to_a_forked_process(anywhere):
    expected = bytes_of(anywhere.read_spans([SPAN]))
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    child = context.Process(target=lambda: found.put(bytes(anywhere.read_spans([SPAN])[0])))
    child.start()
    assert found.get(timeout=60) == expected[0]
    child.join(60)
    assert child.exitcode == 0
    assert bytes_of(anywhere.read_spans([SPAN])) == expected


@pytest.fixture(scope="module", params=["folder", "nginx"])
def place(request, tmp_path_factory) -> tuple[Path, Store]:
    """A folder, and the store that shows it."""
    if request.param == "nginx":
        nginx = request.getfixturevalue("running_nginx")
        return nginx.root, open_store(nginx.url)
    folder = tmp_path_factory.mktemp("files")
    return folder, open_store(folder)


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_spans_are_slices_of_the_files_of_the_moment(place, data):
    folder, store = place
    sizes = data.draw(st.lists(st.integers(0, 300_000), min_size=1, max_size=3), label="sizes")
    seed = data.draw(st.integers(0, 2**32 - 1), label="seed")
    contents = {f"{n}.tar": np.random.default_rng(seed + n).bytes(size) for n, size in enumerate(sizes)}
    for name, content in contents.items():
        replace(folder / name, content)
    edge = st.integers(0, 300_100)
    spans = data.draw(st.lists(st.builds(make_span, st.sampled_from(sorted(contents)), edge, edge), max_size=12))
    results = store.read_spans(spans)
    assert len(results) == len(spans)
    for span, result in zip(spans, results, strict=True):
        content = contents[span.file]
        if span.start < span.end and span.end > len(content):
            said = f"ends before byte {span.end}, cut off or replaced; copy it again"
            assert str(result) == f"{store.path(span.file)}: {said}"
        else:
            assert isinstance(result, memoryview)
            assert bytes(result) == content[span.start : span.end]


def make_span(name: str, one: int, other: int) -> Span:
    return Span(name, min(one, other), max(one, other))


# Opening


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftpx://me:secret@host/a", "scheme ftpx of ftpx://host/a is unknown; give a folder or a http, https, s3 or"),
        (Path("s3://bucket/a"), "s3:/bucket/a lacks a slash after its scheme; give the URL as text"),
        ("s3://key:secret@bucket/a", "s3://bucket/a: was given with credentials"),
        ("s3://", "s3:// is not a URL; give one like https://server/path or s3://bucket/path"),
        ("http://me:secret@host:port/", "http://host:port/ is not a URL"),
        ("http://[::1/a", "http://[::1/a is not a URL"),
    ],
)
def test_an_unusable_url_is_refused_without_showing_its_secrets(url, message):
    pytest.importorskip("s3fs", reason="s3fs is not installed; make install")
    with pytest.raises(StorageError) as refusal:
        open_store(url)
    assert message in str(refusal.value)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("http", "aiohttp")])
def test_a_missing_package_is_named_with_its_cure(scheme, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(StorageError) as refusal:
        open_store(f"{scheme}://bucket/a")
    assert str(refusal.value) == f"{scheme}:// needs {package}; pip install 'mixcl-dist[remote]'"


def test_folders_need_no_package_of_the_extra(folder):
    script = f"""
        import sys
        from mixcl_dist.data_shards.storage.store import Span
        from mixcl_dist.data_shards.storage import open_store
        open_store({str(folder)!r}).read_spans([Span("a.tar", 0, 1)])
        print(sorted({{"aiohttp", "fsspec", "s3fs", "gcsfs", "torch"}} & set(sys.modules)))
    """
    child = [sys.executable, "-c", textwrap.dedent(script)]
    assert subprocess.run(child, capture_output=True, check=True, text=True).stdout == "[]\n"
