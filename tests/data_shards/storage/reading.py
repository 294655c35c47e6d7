"""What the tests of the stores read, and how."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mixcl_dist.data_shards.storage.store import Span, StorageError, Store

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
