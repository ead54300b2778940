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
        self._turn = cycle(_spread(anchors, sources))
        self._moved = dict[TokenizedSample, float]()

    def next(self) -> tuple[TokenizedSample, ...]:
        """Those of the next step."""
        most = sorted(self._moved, key=self._moved.__getitem__, reverse=True)[: self._again]
        chosen = dict.fromkeys(anchor for anchor in most if self._moved[anchor] > MOVED)
        while len(chosen) < self._size:
            chosen.setdefault(next(self._turn))
        return tuple(chosen)

    def saw(self, anchors: Sequence[TokenizedSample], losses: Sequence[float]) -> None:
        """How far each had moved when its step began, in nats a token."""
        self._moved.update(zip(anchors, losses, strict=True))


def _spread(anchors: Sequence[TokenizedSample], sources: Sequence[int]) -> list[TokenizedSample]:
    """The anchors, each source's spread evenly over all of them."""
    places = [(n + 0.5) / size for size in sources or (len(anchors),) for n in range(size)]
    pairs = zip(places, anchors, strict=True)
    return [anchor for _, anchor in sorted(pairs, key=lambda pair: pair[0])]
