"""Which anchors a step has: most in turn, and again those that were seen to have moved most."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from apollo_trainer.training.samples import TokenizedSample

# Of a step's anchors, the part that is there again; and from how many nats a token on.
AGAIN, MOVED = 0.5, 0.02


class AnchorTurns:
    """The anchors of one run's steps. Training thread.

    Rehearsing what the last steps moved most is prioritized replay (Schaul and others, 2015), with
    the divergence from the run's start as the priority.

    Args:
        anchors: of all sources, one source after the other.
        sources: how many each source gave; empty where there is one.
        per_step: at most so many a step, none twice.
        again: whether some come again; without, all are in turn.
    """

    def __init__(
        self,
        anchors: Sequence[TokenizedSample],
        sources: Sequence[int],
        per_step: int,
        *,
        again: bool,
    ):
        self._size = min(per_step, len(anchors))
        self._again = int(AGAIN * self._size) if again else 0
        # By place: two that are equal are two.
        self._anchors, self._turn = anchors, cycle(_spread(len(anchors), sources))
        self._moved, self._last = dict[int, float](), list[int]()

    def next(self) -> tuple[TokenizedSample, ...]:
        """Those of the next step."""
        most = sorted(self._moved, key=self._moved.__getitem__, reverse=True)[: self._again]
        chosen = dict.fromkeys(place for place in most if self._moved[place] > MOVED)
        while len(chosen) < self._size:
            chosen.setdefault(next(self._turn))
        self._last = list(chosen)
        return tuple(self._anchors[place] for place in chosen)

    def saw(self, losses: Sequence[float]) -> None:
        """How far each of the last step's had moved when it began, in nats a token."""
        self._moved.update(zip(self._last, losses, strict=True))


def _spread(count: int, sources: Sequence[int]) -> list[int]:
    """The places of so many anchors, each source's spread evenly over all of them."""
    parts = [(n + 0.5) / size for size in sources or (count,) for n in range(size)]
    return sorted(range(count), key=parts.__getitem__)
