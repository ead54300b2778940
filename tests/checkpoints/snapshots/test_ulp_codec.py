"""The ulp difference: exact for every bit pattern, and ordered as the numbers are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apollo_trainer.checkpoints.snapshots import ulp_codec

ALL = np.arange(2**16, dtype=np.uint16)
UNSIGNED: dict[int, Any] = {2: np.uint16, 4: np.uint32}


def drawn(data: st.DataObject, itemsize: int, width: int, most_elements: int) -> tuple[Any, Any]:
    """Old and new patterns; many are near: a step of each width, and a mark, must both occur."""
    most = 2 ** (8 * itemsize) - 1
    olds = data.draw(st.lists(st.integers(0, most), max_size=most_elements))
    near = st.integers(-(2**width), 2**width)
    news = [
        data.draw(st.one_of(near.map(lambda d, o=o: (o + d) & most), st.integers(0, most)))
        for o in olds
    ]
    return np.array(olds, UNSIGNED[itemsize]), np.array(news, UNSIGNED[itemsize])


def test_every_16_bit_pattern_has_a_key_of_its_own_and_comes_back() -> None:
    keys = ulp_codec.keys(ALL)
    assert np.unique(keys).size == ALL.size
    assert np.array_equal(ulp_codec.patterns(keys), ALL)
    # The design's key, as a signed number.
    unsigned = ALL ^ np.where(ALL >> 15 == 1, 0xFFFF, 0x8000).astype(np.uint16)
    assert np.array_equal(keys, (unsigned ^ np.uint16(0x8000)).view(np.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_are_ordered_as_the_numbers_are(dtype: torch.dtype) -> None:
    values = torch.from_numpy(ALL.view(np.int16)).view(dtype).float().numpy()
    finite = ~np.isnan(values)
    by_key = values[finite][np.argsort(ulp_codec.keys(ALL)[finite])]
    assert (np.diff(by_key) >= 0).all()


def test_neighbours_differ_by_one_across_exponents_and_zeros_of_both_signs() -> None:
    ordered = ulp_codec.patterns(np.sort(ulp_codec.keys(ALL)))
    steps, escapes = ulp_codec.difference(ordered[:-1].copy(), ordered[1:].copy(), 2)
    assert (steps == 1).all()
    assert escapes.size == 0


@pytest.mark.parametrize("width", [2, 4, 8, 16])
@pytest.mark.parametrize("shift", [0, 1, 2, 7, 8, 127, 128, 129, 0x7FFF, 0x8000, 0xFFFF])
def test_all_patterns_go_to_all_others_and_back(width: int, shift: int) -> None:
    for new in (np.roll(ALL, shift), ALL ^ np.uint16(shift)):
        steps, escapes = ulp_codec.difference(ALL, new, width)
        packed = ulp_codec.pack(steps, width)
        assert packed.size == ulp_codec.packed_size(ALL.size, width)
        out = np.empty_like(ALL)
        ulp_codec.apply(ALL, ulp_codec.unpack(packed, ALL.size, width), escapes, width, out)
        assert np.array_equal(out, new)
        ulp_codec.apply(new, *ulp_codec.difference(new, ALL, width), width, out)
        assert np.array_equal(out, ALL)


@given(data=st.data(), itemsize=st.sampled_from([2, 4]), width=st.sampled_from([2, 4, 8, 16]))
def test_any_two_tensors_come_back(data: st.DataObject, itemsize: int, width: int) -> None:
    old, new = drawn(data, itemsize, width, most_elements=40)
    steps, escapes = ulp_codec.difference(old, new, width)
    unpacked = ulp_codec.unpack(ulp_codec.pack(steps, width), old.size, width)
    ulp_codec.apply(old, unpacked, escapes, width, old)
    assert np.array_equal(old, new)


def test_escapes_that_are_not_those_of_the_marks_are_refused() -> None:
    steps = np.array([0, -128, 1], np.int8)
    for count in (0, 2):
        with pytest.raises(ValueError, match="1 marks"):
            ulp_codec.apply(ALL[:3], steps, ALL[:count], 8, np.empty(3, np.uint16))
    with pytest.raises(ValueError, match="0 marks"):
        ulp_codec.apply(ALL[:3], np.zeros(3, np.int8), ALL[:1], 8, np.empty(3, np.uint16))
