"""What came of a run: its losses, its probes before and after, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from apollo_grpc.v1 import training_pb2 as pb


@dataclass
class Verdict:
    """Of one run that has ended.

    Attributes:
        losses: of each step, in nats a token, before it.
        before, after: whether each probe passed, by its name.
    """

    run_id: str = ""
    losses: list[float] = field(default_factory=list)
    before: dict[str, bool] = field(default_factory=dict)
    after: dict[str, bool] = field(default_factory=dict)
    end: pb.RunEvent.Finished = field(default_factory=pb.RunEvent.Finished)

    @property
    def state(self) -> str:
        """SUCCEEDED, FAILED, CANCELLED or REJECTED."""
        return pb.RunState.Name(self.end.state).removeprefix("RUN_STATE_")

    @property
    def learned(self) -> bool:
        """Whether what was learned is in the weights, and stays there."""
        return self.end.state == pb.RUN_STATE_SUCCEEDED

    def lines(self) -> list[str]:
        """For people."""
        told = [
            f"{name}: {_word(self.before.get(name, False))} -> {_word(passed)}"
            for name, passed in self.after.items()
        ]
        if self.losses:
            first, last = self.losses[0], self.losses[-1]
            told.insert(0, f"{len(self.losses)} steps, loss {first:.4f} -> {last:.4f}")
        ended = f"{self.state}, weight version {self.end.weight_version}"
        why = self.end.failure.message or self.end.stopped.message
        return [*told, f"{ended}: {why}" if why else ended]


def verdict_of(events: Iterable[pb.RunEvent]) -> Verdict:
    """Reads a run to its end. Raises ApolloError where its events cannot be read."""
    found = Verdict()
    for event in events:
        found.run_id = event.run_id
        if event.HasField("step"):
            found.losses.append(event.step.loss)
        elif event.HasField("probed"):
            told = found.after if event.probed.after_training else found.before
            told.update({result.name: result.passed for result in event.probed.results})
        elif event.HasField("finished"):
            found.end = event.finished
    return found


def _word(passed: bool) -> str:
    return "passes" if passed else "fails"
