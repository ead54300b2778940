"""What a check is: a promise of the contract, in its own words, and a function that tries it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from apollo_client.conformance.server import Server

Check = Callable[[Server], None]


class Level(IntEnum):
    """What a check does to the server; those of a higher level are asked for."""

    # Reads, and runs that write nothing.
    READ = 0
    # Also runs that are updates, though of a learning rate of 0, and datasets.
    WRITE = 1
    # Also the model directory, snapshots, and going back to them.
    CHECKPOINTS = 2


@dataclass(frozen=True)
class Promise:
    """One promise.

    Attributes:
        name: a word of its own.
        words: what is promised, as the contract has it.
        trains: it needs a server that takes runs.
    """

    name: str
    words: str
    level: Level
    trains: bool
    check: Check

    @property
    def subject(self) -> str:
        """What it is about: the name of its module."""
        return self.check.__module__.rpartition(".")[2]

    def tried_on(self, server: Server) -> None:
        """Raises BrokenPromiseError, NotApplicableError, or the RpcError of a call that failed."""
        if self.trains:
            server.require_ready()
        self.check(server)


PROMISES: list[Promise] = []


def promise(level: Level = Level.READ, *, trains: bool = True) -> Callable[[Check], Check]:
    """Adds a check to the list; its docstring is the promise."""

    def add(check: Check) -> Check:
        words = " ".join((check.__doc__ or "").split())
        PROMISES.append(Promise(check.__name__, words, level, trains, check))
        return check

    return add
