"""Classes of several sources under one numbering, and what a label leaves open."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixcl_dist.data_shards.catalogue import IGNORED, WORD_BITS, Catalogue, merged

ORGANS = Catalogue(("liver", "spleen", "aorta"))


def members(words: np.ndarray) -> set[int]:
    mask = sum(int(word) << (WORD_BITS * number) for number, word in enumerate(words))
    return {bit for bit in range(mask.bit_length()) if mask >> bit & 1}


def test_classes_are_numbered_from_1_in_the_order_they_are_met():
    catalogue = merged([("liver", "spleen"), (), ("aorta", "liver")])
    assert catalogue == ORGANS
    assert [catalogue.index(name) for name in catalogue.classes] == [1, 2, 3]


def test_an_unknown_class_is_refused_with_the_nearest():
    with pytest.raises(KeyError, match="'livr' is unknown; did you mean 'liver'"):
        ORGANS.index("livr")


def test_an_annotated_label_is_one_class_and_the_background_is_none_of_the_annotated():
    background, liver, spleen, aorta, ignored = ORGANS.candidate_bits(("liver", "aorta"))
    assert members(liver) == {0}
    assert members(aorta) == {2}
    assert members(spleen) == {0, 1, 2, 3, 4}  # a value that nobody looked for says nothing
    assert members(background) == {1, 3, 4}
    assert members(ignored) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("annotated", [None, ()])
def test_without_annotation_any_voxel_may_be_anything(annotated):
    bits = ORGANS.candidate_bits(annotated)
    assert bits.dtype == np.int64 and bits.shape == (5, 1)
    assert all(members(b) == {0, 1, 2, 3, 4} for b in bits)


@given(st.integers(1, IGNORED - 1), st.data())
def test_background_and_annotated_classes_share_no_candidate(count, data):
    catalogue = Catalogue(tuple(f"organ {k}" for k in range(count)))
    annotated = data.draw(st.lists(st.sampled_from(catalogue.classes), unique=True, min_size=1))
    bits = catalogue.candidate_bits(annotated)
    assert (bits >= 0).all()  # the sign bit stays free
    known = {catalogue.index(name) - 1 for name in annotated}
    everything = set(range(count + 2))
    assert members(bits[0]) == everything - known >= {count, count + 1}  # background is never known to be one tissue
    for label in range(1, count + 2):
        assert members(bits[label]) == ({label - 1} if label - 1 in known else everything)


@pytest.mark.parametrize("count", [61, 62, 117, IGNORED - 1])
def test_any_number_of_classes_that_labels_can_hold_can_be_candidates(count):
    bits = Catalogue(tuple(f"organ {k}" for k in range(count))).candidate_bits((f"organ {count - 1}",))
    assert bits.shape == (count + 2, -(-(count + 2) // WORD_BITS))
    assert members(bits[count]) == {count - 1} and members(bits[0]) == {*range(count + 2)} - {count - 1}


def test_more_classes_than_a_label_can_hold_are_refused():
    with pytest.raises(ValueError, match="255 classes; at most 254"):
        merged([tuple(f"organ {k}" for k in range(IGNORED))])


def test_a_class_twice_is_refused():
    with pytest.raises(ValueError, match="'liver' comes twice"):
        Catalogue(("liver", "liver"))
