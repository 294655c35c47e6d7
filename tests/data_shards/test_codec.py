"""Codec: every array comes back as it was, and bytes of another size never become an array."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mixcl_dist.data_shards.codec import decode, digest, encode

shapes = hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=12)
arrays = st.one_of(hnp.arrays(np.int16, shapes), hnp.arrays(np.uint8, shapes))


@given(arrays)
def test_what_is_encoded_comes_back_exactly_and_may_be_written_to(array):
    back = decode(encode(array), array.shape, array.dtype)
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype and back.flags.writeable


def test_an_array_in_another_memory_order_comes_back_in_its_own_order():
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(encode(array), array.shape, np.int16), array)


def test_nearly_constant_labels_take_next_to_no_space():
    label = np.zeros((48, 48, 48), np.uint8)
    label[10:20, 10:20, 10:20] = 3
    assert len(encode(label)) < 0.01 * label.size


@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage):
    with pytest.raises(ValueError, match="bytes"):
        decode(garbage, (8, 8, 8), np.int16)


@pytest.mark.parametrize(("shape", "dtype"), [((8, 8, 9), np.int16), ((8, 8, 8), np.uint8), ((10**6,) * 3, np.int16)])
def test_a_size_other_than_the_expected_is_refused_before_memory_is_taken(shape, dtype):
    payload = encode(np.zeros((8, 8, 8), np.int16))
    with pytest.raises(ValueError, match="expected"):
        decode(payload, shape, dtype)


def test_a_payload_that_was_cut_is_refused():
    payload = encode(np.random.default_rng(0).integers(-1000, 1000, (16, 16, 16), dtype=np.int16))
    with pytest.raises(ValueError, match="expected"):
        decode(payload[:-1], (16, 16, 16), np.int16)


def test_digest_is_xxh3_of_64_bits():
    assert digest(b"payload") == xxhash.xxh3_64(b"payload").hexdigest()
