"""The compiled loops are the reference bit for bit: what one writes, the other reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from apollo_trainer.checkpoints.snapshots import ulp_codec, ulp_loops
from tests.checkpoints.snapshots.test_ulp_codec import ALL, UNSIGNED, drawn

Array = NDArray[Any]
WIDTHS = [2, 4, 8, 16]


def encoded(old: Array, new: Array, width: int) -> tuple[Array, Array, Array]:
    packed = np.full(ulp_codec.packed_size(old.size, width), 0xEE, np.uint8)
    near, far = np.zeros(old.size, np.int8), np.zeros_like(old)
    if width == 16:
        return packed, near[:0], far[: ulp_loops.encode_16(old, new, packed, far)]
    nears, fars = ulp_loops.encode(old, new, width, packed, near, far)
    return packed, near[:nears], far[:fars]


def decoded(old: Array, parts: tuple[Array, Array, Array], width: int, out: Array) -> Any:
    packed, near, far = parts
    if width == 16:
        return 0, ulp_loops.decode_16(old, packed, far, out)
    return ulp_loops.decode(old, packed, near, far, width, out)


def check(old: Array, new: Array, width: int) -> None:
    mine, reference = encoded(old, new, width), ulp_codec.encode(old, new, width)
    for a, b in zip(mine, reference, strict=True):
        assert np.array_equal(a, b)
    for decode_in_place in (False, True):
        out = old.copy() if decode_in_place else np.empty_like(old)
        source = out if decode_in_place else old
        assert decoded(source, mine, width, out) == (mine[1].size, mine[2].size)
        assert np.array_equal(out, new)
        out = old.copy() if decode_in_place else np.empty_like(old)
        ulp_codec.decode(out if decode_in_place else old, *reference, width, out)
        assert np.array_equal(out, new)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shift", [0, 1, 2, 3, 7, 8, 9, 127, 128, 129, 0x7FFF, 0x8000, 0xFFFF])
def test_all_patterns_go_to_all_others_as_in_the_reference(width: int, shift: int) -> None:
    check(ALL, np.roll(ALL, shift), width)
    check(ALL, ALL ^ np.uint16(shift), width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("count", [0, 1, 3, 7, 8, 31, 33, 4095, 4096, 4097, 12289])
def test_any_number_of_elements_is_as_in_the_reference(
    width: int, itemsize: int, count: int
) -> None:
    random = np.random.default_rng(count)
    old = random.integers(0, 2 ** (8 * itemsize), count).astype(UNSIGNED[itemsize])
    near = old + random.normal(0, 2**width / 3, count).astype(np.int64).astype(old.dtype)
    new = np.where(random.random(count) < 0.01, random.permutation(old), near)
    check(old, new, width)


@settings(deadline=None)
@given(data=st.data(), itemsize=st.sampled_from([2, 4]), width=st.sampled_from(WIDTHS))
def test_any_two_tensors_are_as_in_the_reference(
    data: st.DataObject, itemsize: int, width: int
) -> None:
    check(*drawn(data, itemsize, width, most_elements=80), width)


@pytest.mark.parametrize("width", WIDTHS)
def test_escapes_that_are_not_those_of_the_marks_are_counted_not_read(width: int) -> None:
    old, new = ALL[:9000], np.ascontiguousarray(ALL[::-1][:9000])
    packed, near, far = encoded(old, new, width)
    wanted = (near.size, far.size)
    assert decoded(old, (packed, near[:0], far[:0]), width, np.empty_like(old)) != (0, 0)
    more = np.concatenate([far, far])
    assert decoded(old, (packed, near, more), width, np.empty_like(old)) == wanted
    assert wanted != (near.size, more.size)


@pytest.mark.parametrize("width", [2, 4])
def test_marks_behind_the_last_element_are_not_escapes(width: int) -> None:
    old = ALL[:5]
    packed = np.zeros(ulp_codec.packed_size(5, width), np.uint8)
    packed[-1] = 0xAA if width == 2 else 0x80
    marks = int((ulp_codec.unpack(packed, 5, width) == -(2 ** (width - 1))).sum())
    out = np.empty_like(old)
    near = np.zeros(marks, np.int8)
    assert decoded(old, (packed, near, old[:0]), width, out) == (marks, 0)
    expected = np.empty_like(old)
    ulp_codec.decode(old, packed, near, old[:0], width, expected)
    assert np.array_equal(out, expected)
