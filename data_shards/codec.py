"""Array ↔ bytes, without loss and without pickle; a digest tells damaged bytes before they are decoded.

Chosen by measurement on real 96³ patches: LZ4HC for HU decodes about four times as fast as zstd at 8 % more bytes;
labels are nearly constant, where zstd needs a thirtieth of a bit per voxel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import blosc2
import numpy as np
import numpy.typing as npt
import xxhash

DESCRIPTION = {"ct.b2": "blosc2 lz4hc-5 shuffle, int16", "seg.b2": "blosc2 zstd-5 shuffle, uint8"}
"""Member of a sample → how it is stored."""
_COMPRESSOR = {np.dtype(np.int16): blosc2.Codec.LZ4HC, np.dtype(np.uint8): blosc2.Codec.ZSTD}
_BLOCK_BYTES = 1 << 18
"""Fixed, because blosc2's own choice follows the machine's caches and shards would differ between machines."""
_HEADER_BYTES = 32


def encode(array: np.ndarray) -> bytes:
    """Compress HU (int16) or labels (uint8), in C order."""
    return blosc2.compress2(
        np.ascontiguousarray(array),
        codec=_COMPRESSOR[array.dtype],
        clevel=5,
        filters=[blosc2.Filter.SHUFFLE],
        filters_meta=[0],
        typesize=array.dtype.itemsize,
        blocksize=_BLOCK_BYTES,
        nthreads=1,
    )


def decode(payload: bytes, shape: Sequence[int], dtype: npt.DTypeLike) -> np.ndarray:
    """The array that `encode` compressed, writable, in C order.

    Raises `ValueError` unless the payload states exactly the size of `shape` and `dtype`, which is checked before
    anything is allocated. Damage inside the compressed stream may pass: compare `digest` first.
    """
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if len(payload) < _HEADER_BYTES:
        raise ValueError(f"{len(payload)} bytes are too few for a compressed array")
    stated, compressed, _ = blosc2.get_cbuffer_sizes(payload)
    if (stated, compressed) != (expected, len(payload)):
        raise ValueError(
            f"{len(payload)} bytes state {compressed} bytes of {stated} decoded, where {expected} are expected"
        )
    array = np.empty(shape, dtype)
    blosc2.decompress2(payload, dst=array, nthreads=1)
    return array


def decode_into(member: str, payload: bytes | memoryview, out: np.ndarray) -> None:
    """Write the array that `payload`, stored as `member` of a sample, holds over `out`, which is in C order.

    Raises `ValueError` unless the payload states exactly the size of `out`.
    """
    out[...] = decode(bytes(payload), out.shape, out.dtype)


def digest(payload: bytes | memoryview) -> str:
    """xxh3 of 64 bits as 16 hexadecimal digits; finds accidents, not forgery."""
    return xxhash.xxh3_64_hexdigest(payload)
