"""A rank's elements have the numbers that they have in the whole, and make the whole again."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_grpc.region import Region
from apollo_trainer.parallel.parts import Lines, gathered, part_of
from apollo_trainer.parallel.ranks import ALONE

QUICK = settings(deadline=None, max_examples=60, derandomize=True)


@st.composite
def regions(draw):
    """Some runs of each dimension, in any order."""
    root = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    runs = []
    for size in root:
        edges = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
        pieces = draw(st.permutations([(a, b - a) for a, b in itertools.pairwise(edges)]))
        runs.append(tuple(pieces[: draw(st.integers(1, len(pieces)))]))
    return Region(root, tuple(runs))


def numbered(region):
    """The whole, each element of which is its number."""
    return torch.arange(math.prod(region.root)).view(region.root)


@QUICK
@given(regions(), st.data(), st.integers(1, 9))
def test_each_element_of_a_part_has_the_number_that_it_has_in_the_whole(region, data, most):
    numbers = part_of(numbered(region), region).flatten()
    first = data.draw(st.integers(0, len(numbers) - 1))
    count = data.draw(st.integers(0, len(numbers) - first))
    found = [
        starts[:, None] + torch.arange(width)
        for starts, width in Lines.of(region).pieces(first, count, most)
    ]
    found = torch.cat([torch.empty(0, dtype=torch.int64), *(each.flatten() for each in found)])
    assert found.tolist() == numbers[first : first + count].tolist()


@QUICK
@given(regions())
def test_a_part_put_back_is_in_its_place_and_all_else_zero(region):
    whole = numbered(region) + 1
    own = part_of(whole, region)
    again = gathered(own, region, ALONE)
    assert torch.equal(part_of(again, region), own)
    assert int((again != 0).sum()) == own.numel()
    assert torch.equal(again[again != 0], whole[again != 0])


def test_the_whole_is_one_line_and_no_copy():
    whole = torch.arange(12).view(3, 4)
    region = Region.whole_of((3, 4))
    assert [(s.tolist(), w) for s, w in Lines.of(region).pieces(2, 7)] == [([2], 7)]
    assert gathered(whole, region, ALONE) is whole
    assert part_of(whole, region) is whole
