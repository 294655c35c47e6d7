"""Files behind http, https, s3 and gs URLs: ranges asked side by side, every answer checked, failures tried again.

fsspec gives sessions, credentials and the event loop. The requests are made here, because its `cat_ranges` returns
whatever body comes: also all of a file from a server that ignores ranges.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import aiohttp
import fsspec
import yarl
from fsspec.asyn import AsyncFileSystem, sync

from mixcl_dist.data_shards.storage.cache import SpanCache
from mixcl_dist.data_shards.storage.store import (
    Block,
    CacheConfig,
    MissingError,
    Span,
    StorageError,
    Store,
    UnreachableError,
    without_credentials,
)

logger = logging.getLogger(__name__)

ATTEMPTS = 8
FIRST_PAUSE_S = 0.5
"""Doubled after each attempt, less a random part, so that many workers do not come back at one time."""
LONGEST_PAUSE_S = 30.0
PATIENCE_S = 300.0
"""After which one call makes no further attempts."""
ANSWER_TIMEOUT_S = 30.0
SLOWEST_BYTES_PER_S = 1 << 18
"""An attempt may take `ANSWER_TIMEOUT_S` and what its bytes take at this speed."""
LARGEST_SMALL_FILE = 1 << 25
"""Bytes that the time for reading a whole file is reckoned with; one that is sent faster may be larger."""
CONCURRENT_REQUESTS = 16


class RemoteStore(Store):
    """Files below a URL."""

    def __init__(self, url: str, cache: CacheConfig | None = None) -> None:
        self._url = url
        self._scheme, _, self._root = url.partition("://")
        if not _names_a_place(url):
            examples = "give one like https://server/path or s3://bucket/path"
            raise StorageError(f"{without_credentials(url)} is not a URL; {examples}")
        self._public = without_credentials(url).rstrip("/")
        if self._scheme in ("s3", "gs") and self._public != url.rstrip("/"):
            raise StorageError(f"{self._public}: was given with credentials or options; set them in the environment")
        self._cache_config = cache
        self._cache = SpanCache(cache) if cache else None
        self._identities: dict[str, str | None] = {}
        # By process: a forked child can neither use nor close its parent's connections.
        self._connections: dict[int, AsyncFileSystem] = {}

    def __reduce__(self) -> tuple[type[RemoteStore], tuple[str, CacheConfig | None]]:
        return RemoteStore, (self._url, self._cache_config)

    def path(self, name: str) -> str:
        return f"{self._public}/{name}"

    def read(self, name: str) -> bytes:
        if problem := self._unsafe(name):
            raise problem
        (content,) = self._fetch([Block(name, 0, LARGEST_SMALL_FILE)], whole=True)
        if isinstance(content, StorageError):
            raise content
        return content

    def read_spans(self, spans: Sequence[Span]) -> list[memoryview | StorageError]:
        if self._cache is None:
            return super().read_spans(spans)
        identities = self._identify({span.file for span in spans})
        results = [self._kept(span, identities[span.file]) for span in spans]
        missing = [position for position, result in enumerate(results) if result is None]
        for position, result in zip(missing, super().read_spans([spans[p] for p in missing]), strict=True):
            results[position] = result
            file, identity = spans[position].file, identities[spans[position].file]
            # Not when the file was replaced meanwhile.
            if isinstance(result, memoryview) and isinstance(identity, str) and identity == self._identities.get(file):
                self._cache.put(self._key(spans[position], identity), result)
        return [result for result in results if result is not None]

    def forget(self, span: Span) -> None:
        """Drop what the cache holds of `span`, and ask anew which version of its file the server has."""
        identity = self._identities.pop(span.file, None)
        if self._cache and identity:
            self._cache.drop(self._key(span, identity))

    def _identify(self, files: Iterable[str]) -> dict[str, str | StorageError | None]:
        """Which version of each file the server has, None where it does not say.

        Asked once by each process, and again after `forget`: the caller's digests find what a replaced file makes
        stale in between. One byte is read instead of a HEAD, so that it is said in the same words as with a span.
        """
        unknown = [Block(file, 0, 1) for file in files if file not in self._identities and not self._unsafe(file)]
        failures = {}
        for block, content in zip(unknown, self._read_blocks(unknown), strict=True):
            if isinstance(content, StorageError):
                failures[block.file] = content
        return {file: failures.get(file, self._identities.get(file)) for file in files}

    def _kept(self, span: Span, identity: str | StorageError | None) -> memoryview | StorageError | None:
        if isinstance(identity, StorageError):
            return identity
        if identity is None or self._cache is None:
            return None
        return self._cache.get(self._key(span, identity), span.end - span.start)

    def _key(self, span: Span, identity: str) -> str:
        return f"{self.path(span.file)} {identity} {span.start} {span.end}"

    def _read_blocks(self, blocks: Sequence[Block]) -> list[bytes | StorageError]:
        return self._fetch(blocks, whole=False)

    def _fetch(self, blocks: Sequence[Block], whole: bool) -> list[bytes | StorageError]:
        if not blocks:
            return []
        connection = self._connections.get(os.getpid())
        if connection is None:
            options = _OPTIONS[self._scheme]
            connection = fsspec.filesystem(self._scheme, skip_instance_cache=True, **options)
            self._connections[os.getpid()] = connection
        return sync(connection.loop, self._fetch_all, connection, blocks, whole)

    async def _fetch_all(
        self, connection: AsyncFileSystem, blocks: Sequence[Block], whole: bool
    ) -> list[bytes | StorageError]:
        began, permits = time.monotonic(), asyncio.Semaphore(CONCURRENT_REQUESTS)

        async def fetch(block: Block) -> bytes | StorageError:
            async with permits:
                return await self._attempts(connection, block, whole, began)

        return await asyncio.gather(*map(fetch, blocks))

    async def _attempts(
        self, connection: AsyncFileSystem, block: Block, whole: bool, began: float
    ) -> bytes | StorageError:
        address = _address(self._scheme, self._root, block.file)
        wanted = None if whole else (block.start, block.end)
        time_limit_s = ANSWER_TIMEOUT_S + (block.end - block.start) / SLOWEST_BYTES_PER_S
        attempt = 0
        while True:
            attempt += 1
            try:
                async with asyncio.timeout(time_limit_s):
                    answer = await _GET[self._scheme](connection, address, wanted)
            except _RefusedError as refusal:
                kind = MissingError if refusal.is_missing else UnreachableError
                return kind(f"{self.path(block.file)}: {refusal}")
            except _PassingError as failure:
                what = str(failure)
            except TimeoutError:
                what = f"there was no whole answer within {time_limit_s:.3g} s"
            else:
                if answer.body:
                    self._identities[block.file] = answer.identity
                return answer.body
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1)) * _JITTER.uniform(0.5, 1)
            if attempt == ATTEMPTS or time.monotonic() + pause - began > PATIENCE_S:
                tried = f"tried {attempt} times in {time.monotonic() - began:.0f} s"
                return UnreachableError(f"{self.path(block.file)}: {what}, {tried}; see whether the server is well")
            logger.info("%s: %s; trying again in %.1f s", self.path(block.file), what, pause)
            await asyncio.sleep(pause)


_JITTER = random.SystemRandom()
"""Not the global generator, whose state belongs to the application and is the same in forked workers."""


class _Answer(NamedTuple):
    body: bytes
    """Fewer bytes than asked only where the file ends."""
    identity: str | None
    """Changes with the content of the file; None where the server says nothing of the kind."""


class _PassingError(Exception):
    """What may go well at another attempt; the text says what happened."""


class _RefusedError(Exception):
    """What will not go well at another attempt; the text says what happened and what to do."""

    is_missing = False


_NO_SUCH_NAME = "no server has this name; check the URL"


def _failure(status: int, code: str = "") -> Exception:
    """What a status without the bytes means; `code` is S3's name for it."""
    answer = f"HTTP {status}" if code in ("", str(status)) else f"HTTP {status} {code}"
    if status in (408, 425, 429) or status >= 500 or code == "RequestTimeout":
        return _PassingError(f"the server answered {answer}")
    if status in (401, 403, 407):
        return _RefusedError(f"access is refused ({answer}); check the credentials and what they permit")
    refusal = _RefusedError(f"the server refused the request ({answer})")
    if status in (404, 410):
        refusal = _RefusedError(f"is missing ({answer})")
        refusal.is_missing = True
    return refusal


def _length(wanted: tuple[int, int], content_range: str | None) -> int:
    """How many bytes a partial answer has, from its Content-Range."""
    start, end = wanted
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", content_range or "")
    if found is None or int(found[1]) != start or not start < int(found[2]) + 1 <= end:
        asked = f"for bytes {start}-{end - 1} the server sent {content_range or 'no Content-Range'}"
        raise _RefusedError(f"{asked}; serve the shards from one that supports ranges")
    is_end_of_file = found[3] == str(int(found[2]) + 1)
    if int(found[2]) + 1 < end and not is_end_of_file:
        raise _PassingError(f"the server sent only {content_range}")
    return int(found[2]) + 1 - start


async def _get_http(connection: Any, address: str, wanted: tuple[int, int] | None) -> _Answer:
    session = await connection.set_session()
    return await _get_by(session, yarl.URL(address, encoded=True), {}, wanted)


async def _get_gs(connection: Any, address: str, wanted: tuple[int, int] | None) -> _Answer:
    from google.auth.exceptions import GoogleAuthError

    await connection._set_session()
    try:
        headers = connection._get_headers(None)
    except GoogleAuthError as error:
        raise _RefusedError(f"no access by these credentials ({type(error).__name__}); check them") from None
    return await _get_by(connection.session, connection.url(address), headers, wanted)


def _trust_by(variable: str) -> str:
    return f"check the server's certificate, or name the file of its authority in {variable}"


async def _get_by(
    session: aiohttp.ClientSession, url: yarl.URL | str, headers: dict[str, str], wanted: tuple[int, int] | None
) -> _Answer:
    headers = headers | {"Accept-Encoding": "identity"}
    if wanted:
        headers |= {"Range": f"bytes={wanted[0]}-{wanted[1] - 1}"}
    try:
        # The caller limits the time.
        async with session.get(url, headers=headers, timeout=aiohttp.ClientTimeout(total=None)) as response:
            return await _checked(response, wanted)
    except aiohttp.ClientSSLError as error:
        raise _RefusedError(f"no trusted connection ({type(error).__name__}); {_trust_by('SSL_CERT_FILE')}") from None
    except aiohttp.ClientConnectorError as error:
        number = error.os_error.errno or 0
        if number == socket.EAI_NONAME:
            raise _RefusedError(_NO_SUCH_NAME) from None
        why = os.strerror(number) if number > 0 else error.os_error.strerror  # negative: of the name's look-up
        raise _PassingError(f"no connection ({why})") from None
    except (aiohttp.ClientPayloadError, asyncio.IncompleteReadError):
        raise _PassingError("the body was cut") from None
    except (aiohttp.ClientConnectionError, ConnectionError):
        raise _PassingError("the connection broke") from None
    except aiohttp.ClientResponseError:
        raise _PassingError("the answer was not HTTP") from None
    except UnicodeError:  # of a name that cannot be
        raise _RefusedError(_NO_SUCH_NAME) from None
    except aiohttp.ClientError as error:  # whose text may hold the URL
        raise _RefusedError(f"the server cannot be asked ({type(error).__name__}); check the URL") from None


async def _checked(response: aiohttp.ClientResponse, wanted: tuple[int, int] | None) -> _Answer:
    """The answer whose header has come, once all of its body has."""
    headers = response.headers
    if wanted and (response.status == 416 or (response.status == 200 and response.content_length == 0)):
        return _Answer(b"", None)  # the file ends before, or is empty
    if response.status not in (200, 206):
        raise _failure(response.status)
    if wanted is None:
        if response.content_length is None and "Transfer-Encoding" not in headers:
            what = "the server does not say how long it is, so that a cut would pass unseen"
            raise _RefusedError(f"{what}; serve the shards from one that does")
        return _Answer(await response.read(), _identity(headers))
    if response.status != 206:
        raise _RefusedError("the server ignores ranges; serve the shards from one that supports them")
    length = _length(wanted, headers.get("Content-Range"))
    if response.content_length not in (None, length):
        raise _PassingError(f"the server sent {response.content_length} bytes instead of {length}")
    return _Answer(await response.content.readexactly(length), _identity(headers))


def _identity(headers: Mapping[str, str]) -> str | None:
    """Google's number of the version, else the ETag, else date and size, which miss two changes in one second."""
    if version := headers.get("x-goog-generation") or headers.get("ETag"):
        return version
    if modified := headers.get("Last-Modified"):
        return f"{modified}, {headers.get('Content-Range', '').rpartition('/')[2]} bytes"
    return None


async def _get_s3(connection: Any, address: str, wanted: tuple[int, int] | None) -> _Answer:
    from botocore import exceptions as boto

    bucket, key, _ = connection.split_path(address)
    asked = {"Bucket": bucket, "Key": key}
    if wanted:
        asked |= {"Range": f"bytes={wanted[0]}-{wanted[1] - 1}"}
    try:
        await connection.set_session()
        client = await connection.get_s3(bucket)
        response = await client.get_object(**connection._get_s3_method_kwargs(client.get_object, **asked))
        length = _length(wanted, response.get("ContentRange")) if wanted else response["ContentLength"]
        if response["ContentLength"] != length:
            raise _PassingError(f"the server sent {response['ContentLength']} bytes instead of {length}")
        async with response["Body"] as stream:
            return _Answer(await stream.read(), response.get("ETag"))
    except boto.ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400)
        if status == 416 and wanted:
            return _Answer(b"", None)
        raise _failure(status, error.response.get("Error", {}).get("Code", "")) from None
    except boto.SSLError:
        raise _RefusedError(f"no trusted connection; {_trust_by('AWS_CA_BUNDLE')}") from None
    except (boto.IncompleteReadError, boto.FlexibleChecksumError, aiohttp.ClientPayloadError):
        raise _PassingError("the body was cut") from None
    except (boto.HTTPClientError, boto.ConnectionError, aiohttp.ClientError, ConnectionError) as error:
        raise _PassingError(f"the connection broke ({type(error).__name__})") from None
    except (boto.BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
        raise _RefusedError(f"{error}; check the credentials and AWS settings".replace("\n", " ")) from None


_GET: dict[str, Callable[[Any, str, tuple[int, int] | None], Awaitable[_Answer]]] = {
    "http": _get_http,
    "https": _get_http,
    "s3": _get_s3,
    "gs": _get_gs,
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "http": {"client_kwargs": {"trust_env": True}},
    "https": {"client_kwargs": {"trust_env": True}},
    # One attempt: they are counted here.
    "s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}, "max_pool_connections": CONCURRENT_REQUESTS}},
    "gs": {},
}


def _names_a_place(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # A bucket's name may have colons.
        return bool(parts.netloc) and (parts.scheme in ("s3", "gs") or parts.port != 0)
    except ValueError:
        return False


def _address(scheme: str, root: str, name: str) -> str:
    """Where a file lies, in the words of its `_GET`; a query, which may be a signature, stays behind the path."""
    if scheme in ("s3", "gs"):
        return f"{root.rstrip('/')}/{name}"
    base = urlsplit(f"{scheme}://{root}")
    path = quote(base.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
    query = f"?{base.query}" if base.query else ""
    return f"{scheme}://{base.netloc}{path}/{quote(name)}{query}"
