"""Codec: every array comes back as it was, and bytes of another size never become an array."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from multiprocessing import shared_memory

import blosc2
import numpy as np
import pcodec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mixcl_dist.data_shards.format.codec import CT_MEMBERS, DESCRIPTION, SEG_MEMBER, decode, decode_into, digest, encode

DTYPES = {"ct.b2": np.int16, "ct.pco": np.int16, "seg.b2": np.uint8}
shapes = hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=12)
stored = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda member: st.tuples(st.just(member), hnp.arrays(DTYPES[member], shapes))
)


def test_every_member_has_a_description():
    assert {*CT_MEMBERS.values(), SEG_MEMBER} == DESCRIPTION.keys() == DTYPES.keys()


@given(stored)
def test_what_is_encoded_comes_back_exactly_and_may_be_written_to(case):
    member, array = case
    back = decode(encode(member, array), array.shape, array.dtype, member)
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype and back.flags.writeable


@pytest.mark.parametrize("member", sorted(DTYPES))
def test_it_decodes_straight_into_one_row_of_shared_memory_and_touches_no_other(member):
    dtype = DTYPES[member]
    array = np.random.default_rng(0).integers(0, 200, (48, 48, 48)).astype(dtype)
    memory = shared_memory.SharedMemory(create=True, size=3 * array.nbytes)
    try:
        rows = np.ndarray((3, *array.shape), dtype, memory.buf)
        rows[:] = 77
        decode_into(member, memoryview(b"xx" + encode(member, array) + b"yy")[2:-2], rows[1])
        np.testing.assert_array_equal(rows[1], array)
        assert (rows[0] == 77).all() and (rows[2] == 77).all()
        del rows
    finally:
        memory.close()
        memory.unlink()


@pytest.mark.parametrize("member", ["ct.b2", "ct.pco"])
def test_an_array_in_another_memory_order_comes_back_in_its_own_order(member):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(encode(member, array), array.shape, np.int16, member), array)


def test_nearly_constant_labels_take_next_to_no_space():
    label = np.zeros((48, 48, 48), np.uint8)
    label[10:20, 10:20, 10:20] = 3
    assert len(encode("seg.b2", label)) < 0.01 * label.size


@pytest.mark.parametrize("member", sorted(DTYPES))
@given(garbage=st.binary(max_size=200))
def test_garbage_is_refused(member, garbage):
    with pytest.raises(ValueError, match="bytes"):
        decode(garbage, (8, 8, 8), DTYPES[member], member)


@pytest.mark.parametrize("member", ["ct.b2", "ct.pco"])
@pytest.mark.parametrize(("shape", "dtype"), [((8, 8, 9), np.int16), ((8, 8, 7), np.int16), ((10**6,) * 3, np.int16)])
def test_a_size_other_than_the_expected_is_refused_before_memory_is_taken(member, shape, dtype):
    payload = encode(member, np.zeros((8, 8, 8), np.int16))
    with pytest.raises(ValueError, match="expected"):
        decode(payload, shape, dtype, member)


@pytest.mark.parametrize(("member", "dtype"), [("ct.b2", np.uint8), ("ct.b2", np.int32), ("ct.pco", np.uint16)])
def test_another_type_of_the_same_number_of_voxels_is_refused(member, dtype):
    with pytest.raises(ValueError, match=r"expected|another type"):
        decode(encode(member, np.zeros((8, 8, 8), np.int16)), (8, 8, 8), dtype, member)


@pytest.mark.parametrize("member", ["ct.b2", "ct.pco"])
def test_a_payload_that_was_cut_is_refused(member):
    payload = encode(member, np.random.default_rng(0).integers(-1000, 1000, (16, 16, 16), dtype=np.int16))
    with pytest.raises(ValueError, match=r"expected|cannot be decoded"):
        decode(payload[:-1], (16, 16, 16), np.int16, member)


def test_an_unknown_codec_is_refused_by_its_ending():
    with pytest.raises(ValueError, match="codec that this version cannot read"):
        decode(b"", (8, 8, 8), np.int16, "ct.jxl")


def blosc(array: np.ndarray, **changes) -> bytes:
    usual = {"codec": blosc2.Codec.LZ4HC, "filters": [blosc2.Filter.SHUFFLE], "filters_meta": [0], "typesize": 2}
    return blosc2.compress2(array, nthreads=1, **usual | changes)


@pytest.mark.parametrize(
    "payload",
    [
        blosc(np.arange(512, dtype=np.int16), filters=[blosc2.Filter.BITSHUFFLE]),
        blosc(np.arange(512, dtype=np.int16), filters=[blosc2.Filter.NOFILTER]),
        blosc(np.arange(512, dtype=np.int16) // 9, codec=blosc2.Codec.ZLIB),
        blosc(np.arange(512, dtype=np.int16), typesize=4),
    ],
)
def test_blosc2_of_another_pipeline_is_refused_since_it_could_name_plug_ins(payload):
    assert len(blosc2.decompress2(payload)) == 1024, "blosc2 itself reads it"
    with pytest.raises(ValueError, match="are not stored as"):
        decode(payload, (8, 8, 8), np.int16)


def test_a_header_that_names_a_plug_in_or_a_huge_block_is_refused():
    payload = encode("ct.b2", (np.arange(4096) // 9).astype(np.int16))
    for place, value in ((2, payload[2] | 0xE0), (11, 0x70), (16, 40), (17, 1), (23, 1), (24, 1), (31, 0x08), (0, 6)):
        forged = bytearray(payload)
        forged[place] = value
        with pytest.raises(ValueError, match="are not stored as"):
            decode(bytes(forged), (4096,), np.int16)


def test_pcodecs_own_reader_agrees_on_the_number_that_the_header_states():
    for count in (1, 2, 63, 64, 1000, 96**3):
        payload = encode("ct.pco", np.zeros(count, np.int16))
        assert len(decode(payload, (count,), np.int16, "ct.pco")) == count
        assert len(pcodec.standalone.simple_decompress(payload)) == count


def test_a_header_that_states_more_numbers_than_follow_is_refused():
    forged = bytearray(encode("ct.pco", np.arange(100, dtype=np.int16)))
    stated = int.from_bytes(forged[6:15], "little")
    forged[6:15] = (stated + (1 << 6)).to_bytes(9, "little")
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(bytes(forged), (101,), np.int16, "ct.pco")


def test_lying_headers_take_no_memory():
    """A process with 300 MB to spare refuses payloads that state gigabytes."""
    code = """
        import resource, struct, numpy as np
        from mixcl_dist.data_shards.format.codec import decode, encode
        held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 300_000_000, held + 300_000_000))
        for place in (4, 8):
            forged = bytearray(encode("ct.b2", np.arange(512, dtype=np.int16) // 9))
            struct.pack_into("<i", forged, place, 2_000_000_000)
            try:
                decode(bytes(forged), (8, 8, 8), np.int16)
            except ValueError:
                print("refused")
        forged = b"pco!" + bytes([3, 0]) + (63 | (1 << 60) << 6).to_bytes(12, "little")
        try:
            decode(forged, (8, 8, 8), np.int16, "ct.pco")
        except ValueError:
            print("refused")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.split() == ["refused"] * 3, done.stderr


def test_digest_is_xxh3_of_64_bits():
    assert digest(b"payload") == digest(memoryview(b"payload")) == xxhash.xxh3_64(b"payload").hexdigest()
