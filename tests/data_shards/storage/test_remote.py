"""Remote stores: few requests, failures on the way tried again, and what cannot pass said at once."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from mixcl_dist.data_shards.storage import open_store
from mixcl_dist.data_shards.storage.store import Span, StorageError, UnreachableError

from .. import servers
from .reading import CONTENT, SPAN, failure, read

# Requests


def test_neighbouring_spans_of_a_file_cost_one_request(nginx):
    (nginx.root / "b.tar").write_bytes(CONTENT)
    spans = [Span(name, n * 1000, n * 1000 + 500) for n in range(100) for name in ("a.tar", "b.tar")]
    assert read(open_store(nginx.url), *spans) == [CONTENT[s.start : s.end] for s in spans]
    assert sorted(nginx.seen()) == ["GET /a.tar 206 bytes=0-99499", "GET /b.tar 206 bytes=0-99499"]


def test_distant_spans_are_asked_apart_and_at_one_time(proxy):
    spans = [Span("a.tar", start, start + 10) for start in (0, 100_000, 200_000)]
    proxy.faults[:], proxy.together = ["together"] * 3, threading.Barrier(3)
    assert read(open_store(proxy.url), *spans) == [CONTENT[s.start : s.end] for s in spans]
    assert proxy.requests == 3


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
        request.getfixturevalue("less_patient")
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
    request.getfixturevalue("less_patient")  # only now: the first client takes its time
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
