"""The solver finds the exact view where there is one, and refuses everything else."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_grpc.region import Region, contiguous_strides, replicas
from apollo_sidecar.affine_map import NotAView, View, solve, to_box

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
    return View(Region.whole_of(shape), draw(st.integers(0, 1000)), tuple(stride))


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
    """Where an element of the parameter lies."""
    own = [view.region.indices(k).index(i) for k, i in enumerate(index)]
    return view.base + dot(own, view.stride)


def assert_each_element_is_where_it_was_copied(shape, found, copies):
    for offset, sizes, strides, place, live in copies:
        for index in itertools.product(*map(range, sizes)):
            element = offset + dot(index, strides)
            assert address(found, unravel(element, shape)) == place + dot(index, live)


def unravel(element, shape):
    return tuple(
        element // step % n for step, n in zip(contiguous_strides(shape), shape, strict=True)
    )


def same_view(shape, found, layout):
    """The same address for every element; strides of one-element dimensions mean nothing."""
    strides = zip(shape, found.stride, layout.stride, strict=True)
    same = found.base == layout.base and found.region == layout.region
    return same and all(n == 1 or a == b for n, a, b in strides)


@QUICK
@given(cases())
def test_the_view_is_found_however_the_parameter_was_cut(case):
    shape, layout, copies = case
    assert same_view(shape, solved(shape, copies), layout)


@QUICK
@given(cases(), st.data())
def test_a_copy_that_is_missing_is_refused_or_missing_in_the_region(case, data):
    shape, _, copies = case
    del copies[data.draw(st.integers(0, len(copies) - 1))]
    with pytest.raises(
        (NotAView, ValueError), match=r"only \d+ of its \d+ elements|one set of str"
    ):
        replicas([solved(shape, copies).region])


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
    assert_each_element_is_where_it_was_copied(shape, found, copies)


@QUICK
@given(cases(), st.data())
def test_part_of_each_dimension_in_any_order_is_a_region(case, data):
    """What a worker loads of a parameter: some indices of each dimension, as one dense tensor."""
    shape, _, _ = case
    kept = [data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True)) for n in shape]
    local = tuple(map(len, kept))
    layout = data.draw(layouts(local))
    copies = [
        (dot([i[at] for i, at in zip(kept, own, strict=True)], contiguous_strides(shape)),
         (1,) * len(shape), (1,) * len(shape), layout.base + dot(own, layout.stride), layout.stride)
        for own in itertools.product(*map(range, local))
    ]  # fmt: skip
    found = solved(shape, data.draw(st.permutations(copies)))
    assert [found.region.indices(k) for k in range(len(shape))] == kept
    assert_each_element_is_where_it_was_copied(shape, found, copies)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_two_boxes_of_experts_that_a_worker_holds_are_one_view(rank):
    """gate and up of [2, 8, 3], four rows of each expert a worker: two boxes for each expert."""
    place = contiguous_strides((2, 8, 3))
    copies = [
        (e * 24 + (half * 4 + rank * 2) * 3, (1, 2, 3), place, 7 + e * 12 + half * 6, (12, 3, 1))
        for e in range(2)
        for half in range(2)
    ]
    found = solved((2, 8, 3), copies)
    assert found.region.indices(1) == [2 * rank, 2 * rank + 1, 4 + 2 * rank, 5 + 2 * rank]
    assert (found.base, found.stride, found.region.shape) == (7, (12, 3, 1), (2, 4, 3))
    assert len(list(found.region.boxes())) == 2


@pytest.mark.parametrize("places", [(0, 4, 9), (0, 4, 4), (0, 5, 9), (2, 4, 7)])
def test_slices_that_lie_unequally_far_apart_are_refused(places):
    copies = [(4 * i, (1, 4), (4, 1), place, (4, 1)) for i, place in enumerate(places)]
    with pytest.raises(NotAView, match="one set of strides cannot express"):
        solved((3, 4), copies)


@QUICK
@given(cases(), st.data())
def test_a_copy_recorded_flat_is_the_same_view(case, data):
    """A loader may view [a, b] as [a * b]; the live side must then be as flat."""
    shape, _, _ = case
    base = data.draw(st.integers(0, 100))
    count = math.prod(shape)
    found = solved(shape, [(0, (count,), (1,), base, (1,))])
    assert same_view(shape, found, View(Region.whole_of(shape), base, contiguous_strides(shape)))


def test_a_transposed_parameter_keeps_its_strides():
    # GPT-2's Conv1D [in, out] in a live [out, in].
    found = solved((2, 3), [(0, (3, 2), (1, 3), 50, (2, 1))])
    assert found == View(Region.whole_of((2, 3)), 50, (1, 2))


def test_the_heads_of_a_row_that_are_swapped_are_a_region_in_another_order():
    found = solved((4,), [(0, (2,), (1,), 2, (1,)), (2, (2,), (1,), 0, (1,))])
    assert found == View(Region((4,), (((2, 2), (0, 2)),)), 0, (1,))


def test_elements_that_lie_backwards_are_refused():
    with pytest.raises(NotAView, match="backwards"):
        solved((4,), [(0, (4,), (1,), 3, (-1,))])


def test_pieces_at_one_address_are_refused():
    with pytest.raises(NotAView, match="one set of strides cannot express"):
        solved((2,), [(0, (1,), (1,), 3, (1,)), (1, (1,), (1,), 3, (1,))])


def test_parts_that_are_no_product_of_indices_are_refused():
    place = contiguous_strides((2, 2))
    corner = [(0, (1, 1), place, 0, place), (3, (1, 1), place, 3, place)]
    with pytest.raises(NotAView, match="only 2 of its 4 elements"):
        solved((2, 2), corner)


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
    assert solved((), [(0, (), (), 7, ())]) == View(Region.whole_of(()), 7, ())


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
    assert solved(shape, copies) == View(Region.whole_of(shape), 2**40, stride)
