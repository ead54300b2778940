"""Which anchors a step has."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from apollo_trainer.runs.anchor_turns import MOVED, AnchorTurns
from apollo_trainer.training.samples import TokenizedSample

FAR = 10 * MOVED


def anchors(count: int) -> list[TokenizedSample]:
    return [TokenizedSample((1,), (number,)) for number in range(count)]


@given(st.integers(1, 40), st.integers(1, 16), st.booleans(), st.randoms(use_true_random=False))
def test_each_is_in_turn_and_none_twice_in_a_step(count, per_step, again, draw) -> None:
    turns = AnchorTurns(anchors(count), (), per_step, again=again)
    size = min(count, per_step)
    counted = Counter[TokenizedSample]()
    for _ in range(2 * -(-count // max(1, size - size // 2))):
        chosen = turns.next()
        assert len(chosen) == len(set(chosen)) == size
        counted.update(chosen)
        turns.saw([draw.choice([0.0, FAR]) for _ in chosen])
    assert len(counted) == count


def test_what_moved_most_comes_again_until_it_is_back() -> None:
    turns = AnchorTurns(anchors(12), (), 4, again=True)
    first = turns.next()
    turns.saw([FAR, 0.0, 3 * FAR, 2 * FAR])
    second = turns.next()
    assert second[:2] == (first[2], first[3])
    turns.saw([0.0, FAR, 0.0, 0.0])
    third = turns.next()
    assert {first[0], first[3]} <= set(third)
    turns.saw([0.0] * 4)
    assert not set(first) & set(turns.next())


def test_without_all_are_in_turn_whatever_moved() -> None:
    turns = AnchorTurns(anchors(6), (), 3, again=False)
    first = turns.next()
    turns.saw([FAR] * 3)
    assert not set(first) & set(turns.next())


def test_each_source_is_spread_over_all_steps() -> None:
    given_anchors = anchors(12)
    turns = AnchorTurns(given_anchors, (9, 3), 4, again=True)
    few = set(given_anchors[9:])
    assert [len(few & set(turns.next())) for _ in range(3)] == [1, 1, 1]


def test_equal_ones_are_taken_as_often_as_they_were_given() -> None:
    (same,) = anchors(1)
    turns = AnchorTurns([same] * 3, (), 2, again=True)
    for _ in range(3):
        assert turns.next() == (same, same)
        turns.saw([FAR, FAR])
