"""What is refused of a store, a cache or a lock can be mended as its message says: each cure is followed here."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from mixcl_dist.data_shards.storage import open_store
from mixcl_dist.data_shards.storage.cache import SpanCache
from mixcl_dist.data_shards.storage.publishing import HeldError, exclusive
from mixcl_dist.data_shards.storage.store import CacheConfig, StorageError

from .reading import CONTENT, SPAN, failure, read


@pytest.mark.parametrize(
    ("url", "said", "cured"),
    [
        ("https:/server/set", "lacks a slash .*; give the URL as text", "https://server/set"),
        ("ftp://server/set", "give a folder or a (http), https, s3 or gs URL", "{}://server/set"),
        ("https://", "give one like (https://server/path) or", "{}"),
        ("https://", "or (s3://bucket/path)$", "{}"),
        ("s3://key:secret@bucket/set", "(s3://bucket/set): .*; set them in the environment", "{}"),
        ("s3://bucket/set?versionId=3", "(s3://bucket/set): .*; set them in the environment", "{}"),
    ],
)
def test_a_url_is_mended_as_it_is_said(url, said, cured):
    with pytest.raises(StorageError) as error:
        open_store(url)
    found = re.search(said, str(error.value))
    assert found and "secret" not in str(error.value)
    open_store(cured.replace("{}", found[1] if found.groups() else ""))


def test_another_folder_makes_a_cache(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file: cannot be made for the cache: .*; give one that you may write"):
        SpanCache(CacheConfig(tmp_path / "file", 10**6))
    SpanCache(CacheConfig(tmp_path / "folder", 10**6))


def test_a_lock_is_free_once_its_holder_has_ended_or_its_file_is_deleted(tmp_path):
    lock = tmp_path / "lock"
    with exclusive(lock), pytest.raises(HeldError, match="is working here; wait for it"), exclusive(lock):
        pass
    with exclusive(lock):
        pass
    lock.write_text(f"not-{os.uname().nodename} 17")
    with pytest.raises(HeldError) as error, exclusive(lock):
        pass
    (path,) = re.findall("if it runs no more, delete (.*)$", str(error.value))
    os.unlink(path)
    with exclusive(lock):
        pass


def test_a_file_that_was_cut_off_is_copied_again(folder):
    (folder / "a.tar").write_bytes(CONTENT[:100])
    assert "cut off or replaced; copy it again" in str(failure(open_store(folder)))
    (folder / "a.tar").write_bytes(CONTENT)
    read(open_store(folder), SPAN)


def test_a_server_of_shards_has_ranges(nginx):
    said = str(failure(open_store(f"{nginx.url}/without-ranges")))
    assert "the server ignores ranges; serve the shards from one that supports them" in said
    read(open_store(nginx.url), SPAN)


def test_a_server_of_shards_says_how_long_files_are(proxy, nginx):
    proxy.faults[:] = ["unsized"]
    with pytest.raises(StorageError, match=r"does not say how long it is, .*; serve the shards from one that does$"):
        open_store(proxy.url).read("a.tar")
    assert open_store(nginx.url).read("a.tar") == CONTENT


def test_a_server_that_refuses_access_is_given_credentials(nginx, hasty):
    said = str(failure(open_store(f"{nginx.url}/locked")))
    assert "check the credentials and what they permit" in said
    read(open_store(nginx.url.replace("//", "//reader:secret@") + "/locked"), SPAN)


def test_s3_is_given_credentials_and_an_endpoint_by_its_settings(s3, monkeypatch):
    for name, wrong in (("AWS_SECRET_ACCESS_KEY", None), ("AWS_ENDPOINT_URL", "localhost")):
        with monkeypatch.context() as patch:
            patch.delenv(name) if wrong is None else patch.setenv(name, wrong)
            assert "; check the credentials and AWS settings" in str(failure(open_store(s3)))
    read(open_store(s3), SPAN)


def test_a_server_that_is_not_well_is_asked_again_once_it_is(proxy):
    proxy.faults[:] = [503] * 3
    assert "tried 3 times in 0 s; see whether the server is well" in str(failure(open_store(proxy.url)))
    read(open_store(proxy.url), SPAN)


def test_a_name_that_no_server_has_is_mended_in_the_url(nginx, hasty):
    assert "no server has this name; check the URL" in str(failure(open_store("http://not..possible/a")))
    read(open_store(nginx.url), SPAN)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def encrypted(folder) -> Iterator[str]:
    """The address of a server over a folder, whose certificate, in `folder`, no authority has signed."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate]
    made += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(made, check=True, capture_output=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


READ = """
import sys
from mixcl_dist.data_shards.storage import open_store
from mixcl_dist.data_shards.storage.store import StorageError
try:
    print(len(open_store(sys.argv[1]).read("a.tar")))
except StorageError as error:
    print(error)
"""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed; apt-get install openssl")
@pytest.mark.parametrize("scheme", ["https", pytest.param("s3", marks=pytest.mark.slow)])
def test_an_authority_of_ones_own_is_trusted_once_it_is_named(folder, scheme):
    """In processes of their own, as the variable is read when they start."""
    (folder / "set").mkdir()
    (folder / "a.tar").rename(folder / "set" / "a.tar")
    with encrypted(folder) as address:
        environment = os.environ | {"AWS_ENDPOINT_URL": address, "AWS_EC2_METADATA_DISABLED": "true"}
        environment |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}

        def said(**variables: str) -> str:
            place = f"{address}/set" if scheme == "https" else "s3://set"
            command = [sys.executable, "-c", READ, place]
            return subprocess.run(command, env=environment | variables, capture_output=True, text=True).stdout

        (variable,) = re.findall("or name the file of its authority in ([A-Z_]+)$", said().strip())
        assert said(**{variable: str(folder / "certificate.pem")}) == f"{len(CONTENT)}\n"
