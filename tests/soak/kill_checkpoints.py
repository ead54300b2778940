"""The training server killed while it syncs, snapshots, restores and takes back."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM

from apollo_client import ApolloClient
from apollo_grpc.errors import ApolloError, FailedPrecondition
from tests.server_process import ServerProcess

SAMPLE = {"context_ids": [60, 61, 62], "continuation_ids": [70, 71, 72, 73]}
# On a tiny model each of them takes some 20 ms.
LONGEST_SECONDS = 0.03
OPERATIONS = ("sync", "snapshot", "restore", "undo")


@dataclass
class Outcome:
    """What was seen: kills in each operation, how many of them cut one off, mixed weights after."""

    kills: Counter[str] = field(default_factory=Counter)
    cut_off: Counter[str] = field(default_factory=Counter)
    poisoned: int = 0
    generations: int = 0


def kill_again_and_again(
    server: ServerProcess,
    model: Path,
    kills: int,
    seed: int,
    look: Callable[[int], None] = lambda number: None,
) -> Outcome:
    """Kills in each operation in turn; after each kill requires that nothing is torn.

    Args:
        look: called after each kill, when the directory was found whole.
    """
    draw, outcome = random.Random(seed), Outcome()
    with ApolloClient(server.address) as client:
        _train(client, draw)
        client.sync()
        client.create_snapshot("anchor")
    for number in range(kills):
        operation = OPERATIONS[number % len(OPERATIONS)]
        _kill_in(server, operation, draw, outcome)
        server.start()
        server.wait_attached()
        with ApolloClient(server.address) as client:
            _require_whole(client, model, outcome)
        look(number)
        print(f"killed {number + 1} of {kills}, in {operation}", flush=True)
    return outcome


def _train(client: ApolloClient, draw: random.Random) -> None:
    *_, last = client.train([SAMPLE], epochs=draw.choice([1, 2, 5]), lr=1e-3)
    assert not last.finished.HasField("failure"), last.finished.failure


def _kill_in(server: ServerProcess, operation: str, draw: random.Random, outcome: Outcome) -> None:
    with ApolloClient(server.address) as client:
        _train(client, draw)
        calls: dict[str, Callable[[], object]] = {
            "sync": client.sync,
            "snapshot": client.create_snapshot,
            "restore": lambda: client.restore("anchor"),
            "undo": client.undo,
        }
        ended = threading.Event()

        def call() -> None:
            try:
                calls[operation]()
                ended.set()
            except ApolloError:
                # The server went meanwhile.
                pass

        thread = threading.Thread(target=call)
        thread.start()
        time.sleep(draw.uniform(0, LONGEST_SECONDS))
        outcome.kills[operation] += 1
        outcome.cut_off[operation] += not ended.is_set()
        server.end(signal.SIGKILL)
        thread.join(30)
        assert not thread.is_alive()


def _require_whole(client: ApolloClient, model: Path, outcome: Outcome) -> None:
    verified = client.verify(full=True)
    assert not verified.differences, verified
    outcome.generations = max(outcome.generations, verified.generation)
    AutoModelForCausalLM.from_pretrained(model)
    for snapshot in client.list_snapshots().snapshots:
        assert client.get_snapshot(snapshot.snapshot_id) == snapshot
    try:
        client.sync()
    except FailedPrecondition as error:
        assert error.reason == "WEIGHTS_POISONED", error
        outcome.poisoned += 1
        client.restore("anchor")
        client.sync()
    assert not client.verify(full=True, live=True).differences
