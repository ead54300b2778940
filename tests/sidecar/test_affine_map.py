"""The solver finds the exact view where there is one, and refuses everything else."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_sidecar.affine_map import NotAView, View, contiguous_strides, solve, to_box

QUICK = settings(deadline=None, max_examples=150, derandomize=True)


@st.composite
def shapes(draw, largest: int = 6):
    return tuple(draw(st.lists(st.integers(1, largest), min_size=1, max_size=4)))


@st.composite
def layouts(draw, shape):
    """A live layout: dimensions in any order, each at least as wide as what it holds."""
    stride, reach = [0] * len(shape), draw(st.integers(1, 3))
    for k in draw(st.permutations(range(len(shape)))):
        stride[k] = reach
        reach = reach * shape[k] + draw(st.integers(0, 3))
    return View(draw(st.integers(0, 1000)), tuple(stride))


@st.composite
def cuts(draw, shape):
    """(start, extent) pieces that cover the shape once, cut along random dimensions."""
    pieces = [(tuple(0 for _ in shape), shape)]
    for _ in range(draw(st.integers(0, 5))):
        start, extent = pieces.pop(draw(st.integers(0, len(pieces) - 1)))
        k = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, extent[k]))
        pieces += [
            (start, (*extent[:k], at, *extent[k + 1 :])),
            (
                (*start[:k], start[k] + at, *start[k + 1 :]),
                (*extent[:k], extent[k] - at, *extent[k + 1 :]),
            ),
        ]
        pieces = [piece for piece in pieces if math.prod(piece[1])]
    return draw(st.permutations(pieces))


def dot(index, stride):
    return sum(i * s for i, s in zip(index, stride, strict=True))


def copies_of(shape, pieces, layout):
    """What a loader would record: (source region, live address, live strides) of each piece."""
    place = contiguous_strides(shape)
    return [
        (dot(start, place), extent, place, layout.base + dot(start, layout.stride), layout.stride)
        for start, extent in pieces
    ]


@st.composite
def cases(draw):
    shape = draw(shapes())
    layout = draw(layouts(shape))
    return shape, layout, copies_of(shape, draw(cuts(shape)), layout)


def solved(shape, copies):
    return solve(shape, [to_box(shape, *copy) for copy in copies])


def address(view, index):
    return view.base + dot(index, view.stride)


def unravel(element, shape):
    return tuple(
        element // step % n for step, n in zip(contiguous_strides(shape), shape, strict=True)
    )


def same_view(shape, found, layout):
    """The same address for every element; strides of one-element dimensions mean nothing."""
    strides = zip(shape, found.stride, layout.stride, strict=True)
    return found.base == layout.base and all(n == 1 or a == b for n, a, b in strides)


@QUICK
@given(cases())
def test_the_view_is_found_however_the_parameter_was_cut(case):
    shape, layout, copies = case
    assert same_view(shape, solved(shape, copies), layout)


@QUICK
@given(cases(), st.data())
def test_a_copy_that_is_missing_is_refused(case, data):
    shape, _, copies = case
    del copies[data.draw(st.integers(0, len(copies) - 1))]
    with pytest.raises(NotAView, match=r"only \d+ of its \d+ elements are copied"):
        solved(shape, copies)


@QUICK
@given(cases(), st.data())
def test_a_copy_made_twice_is_refused(case, data):
    shape, _, copies = case
    copies.append(data.draw(st.sampled_from(copies)))
    with pytest.raises(NotAView, match="more than one place"):
        solved(shape, copies)


@QUICK
@given(cases(), st.data())
def test_a_copy_twice_in_place_of_another_is_refused(case, data):
    shape, _, copies = case
    position = data.draw(st.integers(0, len(copies) - 1))
    copies[position] = copies[position - 1]
    if len(copies) > 1:
        with pytest.raises(NotAView):
            solved(shape, copies)


@QUICK
@given(cases(), st.data(), st.integers(1, 5))
def test_a_copy_that_lies_elsewhere_never_yields_a_wrong_address(case, data, by):
    """Either refused, or, where two pieces still make a view, the view of what was recorded."""
    shape, _, copies = case
    position = data.draw(st.integers(0, len(copies) - 1))
    offset, sizes, strides, place, live = copies[position]
    copies[position] = (offset, sizes, strides, place + by, live)
    try:
        found = solved(shape, copies)
    except NotAView:
        return
    for offset, sizes, strides, place, live in copies:
        for index in itertools.product(*map(range, sizes)):
            element = offset + dot(index, strides)
            assert address(found, unravel(element, shape)) == place + dot(index, live)


@QUICK
@given(shapes(), st.data())
def test_one_of_three_equal_slices_moved_is_refused(rest, data):
    shape = (3, *rest)
    layout = data.draw(layouts(shape))
    pieces = [((i, *(0 for _ in rest)), (1, *rest)) for i in range(3)]
    copies = copies_of(shape, pieces, layout)
    moved = data.draw(st.integers(0, 2))
    offset, sizes, strides, place, live = copies[moved]
    copies[moved] = (offset, sizes, strides, place + data.draw(st.integers(1, 9)), live)
    with pytest.raises(NotAView, match="one set of strides cannot express"):
        solved(shape, copies)


@QUICK
@given(cases(), st.data())
def test_a_copy_recorded_flat_is_the_same_view(case, data):
    """A loader may view [a, b] as [a * b]; the live side must then be as flat."""
    shape, _, _ = case
    base = data.draw(st.integers(0, 100))
    count = math.prod(shape)
    found = solved(shape, [(0, (count,), (1,), base, (1,))])
    assert same_view(shape, found, View(base, contiguous_strides(shape)))


def test_a_transposed_parameter_keeps_its_strides():
    # GPT-2's Conv1D [in, out] in a live [out, in].
    assert solved((2, 3), [(0, (3, 2), (1, 3), 50, (2, 1))]) == View(50, (1, 2))


def test_the_heads_of_a_row_that_are_swapped_are_refused():
    copies = [(0, (2,), (1,), 2, (1,)), (2, (2,), (1,), 0, (1,))]
    with pytest.raises(NotAView):
        solved((4,), copies)


def test_interleaved_elements_are_refused():
    copies = [(0, (2,), (2,), 0, (1,)), (1, (2,), (2,), 2, (1,))]
    with pytest.raises(NotAView, match="every n-th element"):
        solved((4,), copies)


def test_slices_of_two_different_strides_are_refused():
    copies = [(0, (1, 4), (4, 1), 0, (4, 1)), (4, (1, 4), (4, 1), 4, (4, 2))]
    with pytest.raises(NotAView, match="different strides"):
        solved((2, 4), copies)


def test_an_element_copied_to_several_places_is_refused():
    with pytest.raises(NotAView, match="several places"):
        solved((4,), [(0, (4, 2), (1, 0), 0, (2, 1))])


def test_a_region_that_leaves_its_dimension_is_refused():
    with pytest.raises(NotAView, match="rearranged"):
        solved((2, 4), [(2, (1, 4), (4, 1), 0, (4, 1)), (0, (1, 4), (4, 1), 4, (4, 1))])


def test_a_scalar_parameter_is_a_view():
    assert solved((), [(0, (), (), 7, ())]) == View(7, ())


def test_nothing_copied_is_refused():
    with pytest.raises(NotAView, match="only 0 of its 6"):
        solve((2, 3), [])


def test_addresses_above_32_bits_are_exact():
    shape, stride = (70_000, 70_000), (140_000, 1)
    half = 35_000
    copies = [
        (start * 70_000, (half, 70_000), (70_000, 1), 2**40 + start * 140_000, stride)
        for start in (0, half)
    ]
    assert solved(shape, copies) == View(2**40, stride)
