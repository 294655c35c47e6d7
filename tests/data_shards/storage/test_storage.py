"""Store: the bytes that lie there or one clear line, from folders and real servers, sound and broken."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixcl_dist.data_shards.storage import open_store
from mixcl_dist.data_shards.storage.store import CacheConfig, MissingError, Span, StorageError, Store, UnreachableError

from .. import servers

CONTENT = np.random.default_rng(0).bytes(300_000)
SPAN = Span("a.tar", 1000, 5000)


def bytes_of(results: list[memoryview | StorageError]) -> list[bytes]:
    """Of spans that must all have been read."""
    for result in results:
        if isinstance(result, StorageError):
            raise result
    return [bytes(result) for result in results if isinstance(result, memoryview)]


def read(store: Store, *spans: Span) -> list[bytes]:
    return bytes_of(store.read_spans(spans))


def failure(store: Store, span: Span = SPAN) -> StorageError:
    (result,) = store.read_spans([span])
    assert isinstance(result, StorageError)
    assert "\n" not in str(result)
    assert store.path(span.file) in str(result)
    return result


def replace(path: Path, content: bytes) -> None:
    """As another machine would: the file is whole at any time, and another one afterwards."""
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    return tmp_path


@pytest.fixture(scope="module")
def running_nginx(tmp_path_factory) -> Iterator[servers.Nginx]:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    with servers.nginx(tmp_path_factory.mktemp("nginx")) as nginx:
        yield nginx


@pytest.fixture
def nginx(running_nginx) -> servers.Nginx:
    """With a.tar alone, and nothing seen yet."""
    shutil.rmtree(running_nginx.root)
    running_nginx.root.mkdir()
    (running_nginx.root / "a.tar").write_bytes(CONTENT)
    running_nginx.seen()
    return running_nginx


@pytest.fixture
def hasty(monkeypatch) -> None:
    """Few attempts at short intervals."""
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    monkeypatch.setattr("mixcl_dist.data_shards.storage.remote.ATTEMPTS", 3)
    monkeypatch.setattr("mixcl_dist.data_shards.storage.remote.FIRST_PAUSE_S", 0.01)


@pytest.fixture
def impatient(hasty, monkeypatch) -> None:
    monkeypatch.setattr("mixcl_dist.data_shards.storage.remote.ANSWER_TIMEOUT_S", 0.7)


@pytest.fixture
def proxy(nginx, hasty) -> Iterator[servers.Proxy]:
    with servers.proxy(nginx.url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    with pytest.MonkeyPatch.context() as environment, servers.s3() as endpoint:
        for name, value in servers.ACCESS.items():
            environment.setenv(name, value)
        import boto3

        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket=servers.BUCKET)
        client.put_object(Bucket=servers.BUCKET, Key="set/a.tar", Body=CONTENT)
        yield endpoint


@pytest.fixture
def s3(s3_endpoint, hasty, monkeypatch) -> str:
    """The URL of a folder with a.tar; its endpoint is in the environment."""
    unset = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_PROFILE": "default"}
    environment = {**unset, **servers.ACCESS, "AWS_ENDPOINT_URL": s3_endpoint, "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE")
    return f"s3://{servers.BUCKET}/set"


@pytest.fixture
def gs(hasty, monkeypatch) -> Iterator[str]:
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    with servers.google_storage() as endpoint:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
        servers.upload_to_google_storage(endpoint, "set/a.tar", CONTENT)
        yield f"gs://{servers.BUCKET}/set"


@pytest.fixture(params=["folder", "nginx", "s3", "gs"])
def anywhere(request) -> Store:
    """A store with a.tar."""
    place = request.getfixturevalue(request.param)
    return open_store(place.url if request.param == "nginx" else place)


# What every store does


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
        assert "b.tar: ends before byte 1;" in str(failure(store, Span("b.tar", 0, 1)))


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
            assert str(result) == f"{store.path(span.file)}: ends before byte {span.end}; it was cut off or replaced"
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
    pytest.importorskip("s3fs", reason="s3fs is not installed")
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


# Folders


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
    assert "a.tar: ends before byte 5000; it was cut off or replaced" in str(failure(store))
    assert read(store, Span("a.tar", 1000, 4999)) == [CONTENT[1000:4999]]


def test_a_span_larger_than_memory_is_refused_before_any_is_taken(folder):
    assert "ends before byte" in str(failure(open_store(folder), Span("a.tar", 0, 1 << 60)))


def test_a_folder_in_place_of_a_file_is_refused(folder):
    (folder / "b.tar").mkdir()
    assert "b.tar: Is a directory" in str(failure(open_store(folder), Span("b.tar", 0, 1)))


def test_few_files_are_open_at_a_time_and_none_afterwards(folder):
    spans = [Span(f"{n}.tar", 0, 4) for n in range(300)]
    for span in spans:
        (folder / span.file).write_bytes(b"%4d" % int(span.file[:-4]))
    before = len(os.listdir("/proc/self/fd"))
    store = open_store(folder)
    for _ in range(2):
        assert read(store, *spans) == [b"%4d" % n for n in range(300)]
    assert before < len(os.listdir("/proc/self/fd")) <= before + 64
    del store
    assert len(os.listdir("/proc/self/fd")) == before


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


# Requests


def test_neighbouring_spans_of_a_file_cost_one_request(nginx):
    (nginx.root / "b.tar").write_bytes(CONTENT)
    spans = [Span(name, n * 1000, n * 1000 + 500) for n in range(100) for name in ("a.tar", "b.tar")]
    assert read(open_store(nginx.url), *spans) == [CONTENT[s.start : s.end] for s in spans]
    assert sorted(nginx.seen()) == ["GET /a.tar 206 bytes=0-99499", "GET /b.tar 206 bytes=0-99499"]


def test_distant_spans_are_asked_apart_and_at_one_time(proxy):
    spans = [Span("a.tar", start, start + 10) for start in (0, 100_000, 200_000)]
    proxy.faults[:] = ["late"] * 3
    assert read(open_store(proxy.url), *spans) == [CONTENT[s.start : s.end] for s in spans]
    assert (proxy.requests, proxy.most_at_once) == (3, 3)


def test_requests_do_not_grow_without_bound(nginx):
    content = bytes(20 << 20)
    (nginx.root / "b.tar").write_bytes(content)
    spans = [Span("b.tar", start, start + (1 << 20)) for start in range(0, len(content), 1 << 20)]
    assert b"".join(read(open_store(nginx.url), *spans)) == content
    assert len(nginx.seen()) == 3


# Failures on the way

PASSING = ["reset", "cut", "stall", "short", "long", "garbage", 503, 500, 429]


@pytest.mark.parametrize("fault", PASSING)
def test_what_may_pass_is_tried_again(proxy, fault, request):
    if fault == "stall":
        request.getfixturevalue("impatient")
    proxy.faults[:] = [fault]
    assert read(open_store(proxy.url), SPAN) == [CONTENT[1000:5000]]
    assert proxy.requests == 2


@pytest.mark.parametrize("fault", ["cut", 503])
def test_whole_files_are_tried_again_too(proxy, fault):
    proxy.faults[:] = [fault, fault]
    assert open_store(proxy.url).read("a.tar") == CONTENT
    assert proxy.requests == 3


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("reset", "the connection broke"),
        ("cut", "the body was cut"),
        ("stall", "there was no whole answer within 0.715 s"),
        ("garbage", "the answer was not HTTP"),
        (503, "the server answered HTTP 503"),
    ],
)
def test_what_does_not_pass_is_given_up_with_its_cause_and_the_number_of_attempts(proxy, impatient, fault, what):
    proxy.faults[:] = [fault] * 99
    error = failure(open_store(proxy.url))
    assert isinstance(error, UnreachableError)
    assert f"{what}, tried 3 times in" in str(error)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (404, "is missing (HTTP 404)"),
        (403, "access is refused (HTTP 403); check the credentials"),
        (401, "access is refused (HTTP 401); check the credentials"),
        (400, "the server refused the request (HTTP 400)"),
        ("earlier", "for bytes 1000-4999 the server sent bytes 999-4998/300000"),
        ("later", "for bytes 1000-4999 the server sent bytes 1001-5000/300000"),
        ("whole", "the server ignores ranges; serve the shards from one that supports them"),
    ],
)
def test_what_cannot_pass_is_not_tried_again(proxy, fault, what):
    proxy.faults[:] = [fault]
    assert what in str(failure(open_store(proxy.url)))
    assert proxy.requests == 1


def test_a_whole_file_of_unknown_length_is_refused_because_a_cut_would_pass_unseen(proxy):
    proxy.faults[:] = ["unsized", "unsized"]
    with pytest.raises(StorageError, match="the server does not say how long it is"):
        open_store(proxy.url).read("a.tar")
    assert read(open_store(proxy.url), SPAN) == [CONTENT[1000:5000]]


def test_no_attempt_is_made_after_the_time_for_all(proxy, monkeypatch):
    monkeypatch.setattr("mixcl_dist.data_shards.storage.remote.PATIENCE_S", 0)
    proxy.faults[:] = [503] * 99
    assert "tried 1 times" in str(failure(open_store(proxy.url)))


def test_pauses_between_attempts_grow(proxy, monkeypatch, caplog):
    for name, value in {"ATTEMPTS": 5, "FIRST_PAUSE_S": 0.1, "LONGEST_PAUSE_S": 0.4}.items():
        monkeypatch.setattr(f"mixcl_dist.data_shards.storage.remote.{name}", value)
    caplog.set_level(logging.INFO, "mixcl_dist.data_shards.storage.remote")
    proxy.faults[:] = [503] * 4
    read(open_store(proxy.url), SPAN)
    pauses = [record.args[2] for record in caplog.records]
    for pause, longest in zip(pauses, (0.1, 0.2, 0.4, 0.4), strict=True):
        assert longest / 2 <= pause <= longest
    assert pauses[2] != pauses[3]


def test_a_server_that_is_down_is_named(nginx, hasty):
    error = failure(open_store("http://127.0.0.1:1/shards"))
    assert isinstance(error, UnreachableError)
    assert "no connection (Connection refused), tried 3 times" in str(error)


def test_a_name_that_no_server_has_is_not_tried_again(hasty, monkeypatch):
    def look_up(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for url in ("http://no-such-server/a", "http://not..possible/a"):
        assert str(failure(open_store(url))) == f"{url}/a.tar: no server has this name; check the URL"


def test_a_server_without_ranges_is_found_out(nginx):
    store = open_store(f"{nginx.url}/without-ranges")
    assert "the server ignores ranges" in str(failure(store))
    assert store.read("a.tar") == CONTENT


def test_a_slow_server_is_waited_for_as_long_as_its_bytes_come_fast_enough(nginx, impatient, monkeypatch):
    store, span = open_store(f"{nginx.url}/slow"), Span("a.tar", 0, 30_000)
    monkeypatch.setattr("mixcl_dist.data_shards.storage.remote.SLOWEST_BYTES_PER_S", 1_000_000)
    assert "no whole answer within 0.73 s, tried 3 times" in str(failure(store, span))
    monkeypatch.setattr("mixcl_dist.data_shards.storage.remote.SLOWEST_BYTES_PER_S", 1000)
    assert read(store, span) == [CONTENT[:30_000]]


def test_credentials_of_a_url_are_used_and_never_shown(nginx, hasty):
    right = open_store(nginx.url.replace("//", "//reader:secret@") + "/locked?signature=secret")
    assert read(right, SPAN) == [CONTENT[1000:5000]]
    assert nginx.seen() == ["GET /locked/a.tar?signature=secret 206 bytes=1000-4999"]
    for wrong in (f"{nginx.url}/locked?signature=secret", nginx.url.replace("//", "//secret:secret@") + "/locked"):
        error = failure(open_store(wrong))
        assert str(error).startswith(f"{nginx.url}/locked/a.tar: access is refused (HTTP 401)")
        assert "secret" not in str(error) + repr(open_store(wrong)) + open_store(wrong).path("a.tar")


# S3 and Google Storage


@pytest.fixture
def s3_proxy(s3, s3_endpoint, monkeypatch) -> Iterator[servers.Proxy]:
    with servers.proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def test_s3_what_may_pass_is_tried_again(s3, s3_proxy, request):
    store = open_store(s3)
    read(store, SPAN)
    request.getfixturevalue("impatient")  # only now: the first client takes its time
    for fault in ("reset", "cut", "stall", "short", "long", "garbage", 503, 429):
        s3_proxy.faults[:], s3_proxy.requests = [fault], 0
        assert read(store, SPAN) == [CONTENT[1000:5000]], fault
        assert s3_proxy.requests == 2, fault


def test_s3_what_does_not_pass_is_given_up(s3, s3_proxy):
    s3_proxy.faults[:] = [503] * 99
    error = failure(open_store(s3))
    assert isinstance(error, UnreachableError)
    assert "the server answered HTTP 503, tried 3 times in" in str(error)
    assert s3_proxy.requests == 3


def test_s3_another_range_than_asked_is_found_out(s3, s3_proxy):
    for fault in ("whole", "earlier", "later"):
        s3_proxy.faults[:], s3_proxy.requests = [fault], 0
        assert "for bytes 1000-4999 the server sent" in str(failure(open_store(s3)))
        assert s3_proxy.requests == 1


def test_s3_a_missing_bucket_is_named(s3):
    error = failure(open_store("s3://no-such-bucket/set"))
    assert str(error) == "s3://no-such-bucket/set/a.tar: is missing (HTTP 404 NoSuchBucket)"


def test_s3_wrong_credentials_are_said_so_at_once(s3, s3_endpoint, monkeypatch):
    import boto3

    users = boto3.client("iam", endpoint_url=s3_endpoint)
    users.create_user(UserName="reader")
    known = users.create_access_key(UserName="reader")["AccessKey"]
    servers.demand_credentials(s3_endpoint, True)
    try:
        for access, secret, code in (
            ("unknown", "secret", "InvalidAccessKeyId"),
            (known["AccessKeyId"], "secret", "SignatureDoesNotMatch"),
            (known["AccessKeyId"], known["SecretAccessKey"], "AccessDenied"),
        ):
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
            error = failure(open_store(s3))
            assert f"access is refused (HTTP 403 {code}); check the credentials" in str(error)
            assert access not in str(error) and secret not in str(error)
    finally:
        servers.demand_credentials(s3_endpoint, False)


def test_s3_no_credentials_are_said_so_at_once(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "Unable to locate credentials; check the credentials and AWS settings" in str(failure(open_store(s3)))


def test_s3_a_setting_that_cannot_be_is_named(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost")
    assert "Invalid endpoint: localhost; check the credentials and AWS settings" in str(failure(open_store(s3)))


def test_google_storage_what_may_pass_is_tried_again_and_another_range_is_found_out(gs, monkeypatch):
    with servers.proxy(os.environ["STORAGE_EMULATOR_HOST"]) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        store = open_store(gs)
        for fault in ("reset", "cut", "short", 503):
            proxy.faults[:], proxy.requests = [fault], 0
            assert read(store, SPAN) == [CONTENT[1000:5000]], fault
            assert proxy.requests == 2, fault
        for fault, what in (
            ("later", "the server sent bytes 1001-5000"),
            ("whole", "ignores ranges"),
            (403, "refused"),
        ):
            proxy.faults[:], proxy.requests = [fault], 0
            assert what in str(failure(store)), fault
            assert proxy.requests == 1, fault


# The cache


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
        pytest.skip("this machine lets nobody mount a small tmpfs")
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
    with pytest.raises(ValueError, match="max_bytes = 0 is out of range"):
        CacheConfig(tmp_path, 0)
