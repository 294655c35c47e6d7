"""Real servers that the tests of remote shards start: nginx, S3, Google Storage, and a proxy that breaks answers."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ..ports import free_port

BUCKET = "shards-bucket"
ACCESS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}

_NGINX = """
daemon off;
worker_processes 1;
pid {home}/pid;
error_log {home}/error.log;
{user}
events {{ worker_connections 256; }}
http {{
    client_body_temp_path {home}/temp1; proxy_temp_path {home}/temp2; fastcgi_temp_path {home}/temp3;
    uwsgi_temp_path {home}/temp4; scgi_temp_path {home}/temp5;
    log_format seen '$request_method $request_uri $status $http_range';
    access_log {home}/access.log seen;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        location = /seen {{ return 204; }}
        location /slow/ {{ alias {root}/; limit_rate 20k; }}
        location /without-ranges/ {{ alias {root}/; max_ranges 0; }}
        location /without-identity/ {{ alias {root}/; etag off; add_header Last-Modified ""; }}
        location /with-date/ {{ alias {root}/; etag off; }}
        location /locked/ {{ alias {root}/; auth_basic shards; auth_basic_user_file {home}/passwords; }}
    }}
}}
"""


@dataclass
class Nginx:
    """nginx over the folder `root`; below `url` also slow/, without-ranges/, without-identity/, with-date/ and
    locked/ (user "reader", password "secret") show it."""

    url: str
    root: Path
    log: Path

    def seen(self) -> list[str]:
        """Method, path, status and range of each request since the last call."""
        # An answer is logged after it was sent, but before the one worker turns to another request.
        urllib.request.urlopen(f"{self.url}/seen").close()
        while (lines := self.log.read_text().splitlines())[-1:] != ["GET /seen 204 -"]:
            time.sleep(0.001)
        self.log.write_text("")
        return lines[:-1]


@contextmanager
def nginx(home: Path) -> Iterator[Nginx]:
    """Skips by name where nginx is not installed."""
    binary = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if binary is None:
        pytest.skip("nginx is not installed; apt-get install nginx-light")
    root = home / "root"
    root.mkdir()
    # The worker is another user where the master is root, and may not enter pytest's folders.
    user = "user root;" if os.getuid() == 0 else ""
    port = free_port()
    (home / "nginx.conf").write_text(_NGINX.format(home=home, root=root, port=port, user=user))
    (home / "passwords").write_text("reader:{PLAIN}secret\n")
    process = subprocess.Popen([binary, "-c", home / "nginx.conf", "-p", home, "-e", home / "error.log"])
    try:
        wait_for(port, process)
        yield Nginx(f"http://127.0.0.1:{port}", root, home / "access.log")
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def s3() -> Iterator[str]:
    """An S3 server that knows `ACCESS` and holds an empty `BUCKET`; gives its endpoint. Skips by name without moto."""
    server = pytest.importorskip("moto.server", reason="moto is not installed; make install").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


def s3_client(endpoint: str) -> Any:
    """Of an S3 server that was started here, whatever the environment says."""
    import boto3

    key, secret, region = ACCESS.values()
    return boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret, region_name=region
    )


@contextmanager
def google_storage() -> Iterator[str]:
    """A Google Storage server that holds an empty `BUCKET`; gives its endpoint. Skips by name without emulator."""
    emulator = pytest.importorskip(
        "gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed; make install"
    )
    with emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET) as server:
        yield f"http://127.0.0.1:{server._api._httpd.server_port}"


def upload_to_google_storage(endpoint: str, name: str, content: bytes) -> None:
    address = f"{endpoint}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}"
    urllib.request.urlopen(urllib.request.Request(address, content, method="POST")).close()


@dataclass
class Proxy:
    """Hands GET requests on to `upstream`; the next ones suffer `faults`, in order, one each.

    "reset": the connection is reset in place of an answer. "cut": after half of the body. "stall": no answer comes.
    "whole": the range is ignored. "earlier", "later", "short": the answer is of another range, of less than the range.
    "long": there are more bytes than its Content-Range says. "unsized": the end of the connection ends the body.
    "together": it comes once all of `together` are asked for. "garbage": it is not HTTP. A number: that status.
    """

    upstream: str
    url: str = ""
    faults: list[str | int] = field(default_factory=list)
    requests: int = 0
    together: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    state = Proxy(upstream.removeprefix("http://"))

    class Handler(_ProxyHandler):
        proxy = state

    server = _ProxyServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        state.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients go away from faults
            super().handle_error(request, client_address)


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def do_GET(self) -> None:
        with self.proxy.lock:
            self.proxy.requests += 1
            fault = self.proxy.faults.pop(0) if self.proxy.faults else ""
        if fault == "stall":
            self.proxy.ended.wait()
        elif fault == "garbage":
            self.wfile.write(b"it is not\r\n\r\n")
        elif isinstance(fault, int):
            self.send_error(fault)
        elif fault != "reset":
            return self._hand_on(fault)
        self._break_off()

    def _hand_on(self, fault: str) -> None:
        if fault == "together":
            self.proxy.together.wait(60)
        asked = {name: value for name, value in self.headers.items() if name != "Range" or fault != "whole"}
        connection = http.client.HTTPConnection(self.proxy.upstream)
        connection.request("GET", self.path, headers=asked)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        headers = {name.title(): value for name, value in answer.getheaders()}
        headers.pop("Transfer-Encoding", None)
        if fault in ("earlier", "later", "short"):
            first, last, total = map(int, headers["Content-Range"].split(" ")[1].replace("/", "-").split("-"))
            before, behind = {"earlier": (-1, -1), "later": (1, 1), "short": (0, -1)}[fault]
            headers["Content-Range"] = f"bytes {first + before}-{last + behind}/{total}"
            body = body[: len(body) + behind - before]
        body += b"more" if fault == "long" else b""
        self.send_response(answer.status)
        headers |= {"Content-Length": str(len(body))}
        if fault == "unsized":
            del headers["Content-Length"]
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = fault in ("cut", "unsized")

    def _break_off(self) -> None:
        """With a reset, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


def demand_credentials(endpoint: str, demand: bool) -> None:
    """Whether the S3 server at `endpoint` checks signatures and permissions from now on."""
    free = b"0" if demand else b"inf"
    request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", free, {"Content-Type": "text/plain"})
    urllib.request.urlopen(request).close()


def wait_for(port: int, process: subprocess.Popen) -> None:
    """Until `process` listens."""
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the server ended with {process.returncode}")
