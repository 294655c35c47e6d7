"""How fast do shards come from where they lie?"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from mixcl_dist.data_shards.format.manifest import Manifest
from mixcl_dist.data_shards.storage import open_store
from mixcl_dist.data_shards.storage.store import Span, StorageError

READ_BYTES = 2**22


def read_rate(shards: Path | str, *, part: int = 0, parts: int = 1, seconds: float = 3.0) -> float:
    """Bytes a second that one thread reads, of `parts` that begin in different places; ends after `seconds` or once it
    has read all. What lies in the system's page cache comes from there. Raises `StorageError` or `ManifestError`."""
    store, total, begin = open_store(shards), 0, time.monotonic()
    spans = list(_spans(Manifest.load(store)))
    first = len(spans) * part // parts
    for span in itertools.chain(spans[first:], spans[:first]):
        (content,) = store.read_spans([span])
        if isinstance(content, StorageError):
            raise content
        total += len(content)
        if time.monotonic() - begin > seconds:
            break
    return total / (time.monotonic() - begin)


def _spans(manifest: Manifest) -> Iterator[Span]:
    for shard in manifest.shards:
        for start in range(0, shard.bytes, READ_BYTES):
            yield Span(shard.file, start, min(start + READ_BYTES, shard.bytes))
