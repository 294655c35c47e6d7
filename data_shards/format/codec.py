"""Array ↔ bytes, without pickle; a digest tells damaged bytes before they are decoded.

A member's ending names its codec: `.b2` is blosc2, `.pco` is pcodec. Chosen by `benchmarks/shards/codec.py` on real
96³ patches: LZ4HC decodes about three times as fast as zstd at a tenth more bytes, pcodec takes a sixth less than
LZ4HC at a fifth of its speed; labels are nearly constant, where zstd needs a thirtieth of a bit per voxel.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import blosc2
import numpy as np
import numpy.typing as npt
import pcodec
import xxhash
from pcodec import standalone

CT_MEMBERS = {"fast": "ct.b2", "small": "ct.pco"}
"""Profile → the member that holds HU."""
SEG_MEMBER = "seg.b2"
DESCRIPTION = {
    "ct.b2": "blosc2 lz4hc-5 shuffle, int16",
    "ct.pco": "pcodec 8, int16",
    "seg.b2": "blosc2 zstd-5 shuffle, uint8",
}
"""Member of a sample → how it is stored."""
_BLOSC = {"ct.b2": blosc2.Codec.LZ4HC, "seg.b2": blosc2.Codec.ZSTD}
_BLOCK_BYTES = 1 << 18
"""Fixed, because blosc2's own choice follows the machine's caches and shards would differ between machines."""
_PCODEC = pcodec.ChunkConfig(compression_level=8)

_BLOSC_HEADER = struct.Struct("<4B3i6sB8sB")
"""Of a blosc2 chunk: format, codec's format, flags, bytes of an element; bytes decoded, of a block, stored; filters,
codec, their parameters, more flags."""
_BLOSC_FORMAT = 5
_SHUFFLE_ALONE = bytes([blosc2.Filter.SHUFFLE.value, 0, 0, 0, 0, 0])
_BUILT_IN = {0, 1, 4}
"""Top bits of the flags: blosclz (which stands for "stored as it is"), LZ4, zstd."""
_CONSTANT = 0x70
"""Bits of the last flags that mark an array of one value."""
_PCODEC_MAGIC = b"pco!"


def encode(member: str, array: np.ndarray) -> bytes:
    """Compress HU (int16) or labels (uint8), in C order, for `member` of a sample."""
    array = np.ascontiguousarray(array)
    if member.endswith(".pco"):
        return standalone.simple_compress(array.reshape(-1), _PCODEC)
    return blosc2.compress2(
        array,
        codec=_BLOSC[member],
        clevel=5,
        filters=[blosc2.Filter.SHUFFLE],
        filters_meta=[0],
        typesize=array.dtype.itemsize,
        blocksize=_BLOCK_BYTES,
        nthreads=1,
    )


def decode(payload: bytes, shape: Sequence[int], dtype: npt.DTypeLike, member: str = "ct.b2") -> np.ndarray:
    """The array that `encode` compressed, writable, in C order; memory is taken only once its size is checked.

    Raises `ValueError` as `decode_into` does.
    """
    _check_header(member, payload, math.prod(shape), np.dtype(dtype).itemsize)
    array = np.empty(shape, dtype)
    decode_into(member, payload, array)
    return array


def decode_into(member: str, payload: bytes | memoryview, out: np.ndarray) -> None:
    """Write the array that `payload`, stored as `member` of a sample, holds over `out`, which is in C order.

    Nothing is copied on the way and nothing but `out` is written, whatever the payload holds. Raises `ValueError`
    for a codec that is not known, for a payload that does not state exactly the size of `out` or was not made by
    `encode`, and for a stream that cannot be decoded. Some damage within a stream gives other voxels instead: compare
    its `digest` first.
    """
    assert out.flags.c_contiguous and out.flags.writeable
    _check_header(member, payload, out.size, out.itemsize)
    try:
        if member.endswith(".b2"):
            blosc2.decompress2(payload, dst=out, nthreads=1)
            return
        done = standalone.simple_decompress_into(bytes(payload), out.reshape(-1))
        whole = done.finished and done.n_processed == out.size
    except (ValueError, RuntimeError, TypeError):
        whole = False
    if not whole:
        raise ValueError("cannot be decoded: it is damaged or holds another type")


def digest(payload: bytes | memoryview) -> str:
    """xxh3 of 64 bits as 16 hexadecimal digits; finds accidents, not forgery."""
    return xxhash.xxh3_64_hexdigest(payload)


def _check_header(member: str, payload: bytes | memoryview, count: int, itemsize: int) -> None:
    """Raise `ValueError` unless `payload` states `count` elements of `itemsize` bytes, stored as `encode` does."""
    if member.endswith(".b2"):
        _check_blosc(payload, count * itemsize, itemsize)
    elif member.endswith(".pco"):
        if bytes(payload[:4]) != _PCODEC_MAGIC:
            raise ValueError(f"{len(payload)} bytes are not pcodec's")
        if (stated := _pcodec_count(payload)) != count:
            raise ValueError(f"{len(payload)} bytes state {stated} numbers, where {count} are expected")
    else:
        raise ValueError(f"has a codec that this version cannot read ({', '.join(DESCRIPTION)}); update mixcl-dist")


def _check_blosc(payload: bytes | memoryview, size: int, itemsize: int) -> None:
    """Own filters and codecs are refused: for those, blosc2 would load and run plug-ins that the payload names."""
    if len(payload) < _BLOSC_HEADER.size:
        raise ValueError(f"{len(payload)} bytes are too few for a compressed array")
    form, _, flags, element, stated, block, stored, filters, _, meta, more = _BLOSC_HEADER.unpack_from(payload)
    if (stated, stored) != (size, len(payload)):
        raise ValueError(f"{len(payload)} bytes state {stored} bytes of {stated} decoded, where {size} are expected")
    built_in = flags >> 5 in _BUILT_IN and filters == _SHUFFLE_ALONE and not any(meta) and not more & ~_CONSTANT
    if form != _BLOSC_FORMAT or element != itemsize or not built_in or not 0 < block <= size:
        raise ValueError(f"{len(payload)} bytes are not stored as this version stores them")


def _pcodec_count(payload: bytes | memoryview) -> int:
    """Numbers that the standalone format's header states: six bits n, then n + 1 bits."""
    stated = int.from_bytes(payload[6:15], "little")
    return stated >> 6 & (2 << (stated & 63)) - 1
