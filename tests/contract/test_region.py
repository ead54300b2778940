"""A region is what a rank holds of a parameter; the ranks' regions are proved to be all of it."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_grpc.region import Region, contiguous_strides, reach, replicas

QUICK = settings(deadline=None, max_examples=60, derandomize=True)


@st.composite
def orders(draw, size):
    """Each index of a dimension once, in any order, as runs."""
    cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=4))})
    return tuple(draw(st.permutations([(a, b - a) for a, b in itertools.pairwise(cuts)])))


@st.composite
def tilings(draw):
    """Regions of some ranks that tile a root once, cut along one dimension, in any order."""
    root = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    axis = draw(st.integers(0, len(root) - 1))
    runs = [draw(orders(size)) for size in root]
    ranks = draw(st.integers(1, len(runs[axis])))
    parts = [runs[axis][r::ranks] for r in range(ranks)]
    return [Region(root, (*runs[:axis], part, *runs[axis + 1 :])) for part in parts]


def elements(region):
    """Of the root, in the order in which the local view has them."""
    return list(itertools.product(*(region.indices(k) for k in range(len(region.root)))))


def inside(box):
    return itertools.product(*(range(side.start, side.stop) for side in box))


def runs_of(indices):
    return tuple((i, 1) for i in indices)


@QUICK
@given(tilings())
def test_parts_that_tile_the_root_pass(regions):
    assert replicas(regions) == [0] * len(regions)
    held = [e for region in regions for e in elements(region)]
    assert sorted(held) == list(itertools.product(*map(range, regions[0].root)))


@QUICK
@given(tilings(), st.integers(2, 3))
def test_each_part_held_by_as_many_ranks_passes_and_one_of_each_is_counted(regions, times):
    together = regions * times
    found = replicas(together)
    assert sorted(found) == sorted([*range(times)] * len(regions))
    assert all(found[r] == r // len(regions) for r in range(len(together)))


@QUICK
@given(tilings(), st.data())
def test_a_rank_that_is_missing_or_there_once_more_is_refused(regions, data):
    one = data.draw(st.sampled_from(regions))
    without = [region for region in regions if region is not one]
    with pytest.raises(ValueError, match=r"only|different shapes"):
        replicas(without)
    if len(regions) > 1:
        with pytest.raises(ValueError, match="more ranks than others"):
            replicas([*regions, one])


@QUICK
@given(st.data())
def test_what_passes_holds_each_element_as_often(data):
    """Any regions at all: most are no tiling."""
    root = (4, 3)
    part = st.sets(st.integers(0, 3), min_size=1)
    rest = st.sets(st.integers(0, 2), min_size=1)
    pairs = data.draw(st.lists(st.tuples(part, rest), min_size=1, max_size=4))
    regions = [Region(root, (runs_of(a), runs_of(b))) for a, b in pairs]
    counts = dict.fromkeys(itertools.product(range(4), range(3)), 0)
    for element in (e for region in regions for e in elements(region)):
        counts[element] += 1
    try:
        found = replicas(regions)
    except ValueError:
        return
    assert len(set(counts.values())) == 1
    assert max(found) + 1 == next(iter(counts.values()))


@QUICK
@given(tilings())
def test_the_boxes_are_the_elements_in_their_order(regions):
    for region in regions:
        at = dict(zip(itertools.product(*map(range, region.shape)), elements(region), strict=True))
        boxed = [
            pair
            for own, there in region.boxes()
            for pair in zip(inside(own), inside(there), strict=True)
        ]
        assert dict(boxed) == at
        assert len(boxed) == math.prod(region.shape)


@QUICK
@given(st.lists(st.integers(1, 5), max_size=4))
def test_the_whole_is_whole_however_it_is_written(root):
    whole = Region.whole_of(root)
    apart = Region(tuple(root), tuple(runs_of(range(n)) for n in root))
    assert whole == apart
    assert whole.whole and whole.complete and whole.shape == tuple(root)
    assert replicas([whole]) == [0]
    assert reach(root, contiguous_strides(tuple(root))) == math.prod(root)


def test_another_order_is_complete_and_not_whole():
    region = Region((4, 2), (((2, 2), (0, 2)), ((0, 2),)))
    assert region.complete and not region.whole
    assert region.is_whole(1) and not region.is_whole(0)
    assert region.indices(0) == [2, 3, 0, 1]
    assert replicas([region]) == [0]
    with pytest.raises(ValueError, match="overlap"):
        replicas([region, Region.whole_of((4, 2))])


@pytest.mark.parametrize(
    "runs",
    [(), ((0, 5),), ((-1, 2),), ((0, 3), (2, 2)), ((0, -1),), ((3, 1), (3, 1))],
)
def test_what_is_no_part_of_its_parameter_is_refused(runs):
    with pytest.raises(ValueError, match="it has"):
        Region((4, 2), (runs, ((0, 2),)))
    with pytest.raises(ValueError, match="runs along 1 of 2"):
        Region((4, 2), (((0, 4),),))


def test_an_embedding_without_rows_is_its_own_whole():
    assert Region.whole_of((0, 3)).whole
