"""The training server killed while it syncs, snapshots, restores and takes back."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import median

from apollo_client import ApolloClient
from apollo_grpc.errors import ApolloError, FailedPrecondition
from apollo_trainer.engine.model_checkpoints import CUT_OFF
from tests.server_process import ServerProcess
from tests.waiting import HANG

OPERATIONS: dict[str, Callable[[ApolloClient], object]] = {
    "sync": lambda client: client.sync(),
    "snapshot": lambda client: client.create_snapshot(),
    "restore": lambda client: client.restore("anchor"),
    "undo": lambda client: client.undo(),
}
# They write to the live weights, for some milliseconds of the second that they take.
WRITERS = ("restore", "undo")
WRITE_SECONDS = 0.02
Files = dict[Path, int]
MEASURED = 3
# Kills come a little after the usual end too.
LATEST = 1.1


@dataclass
class Outcome:
    """What was seen, by operation.

    Attributes:
        kills: of the server.
        cut_off: kills after which the operation never ended for its caller.
        amid: kills after which the disk held what it had begun and not finished.
        mixed: kills after which the live weights were known to be mixed.
        generations: syncs that changed the directory.
    """

    kills: Counter[str] = field(default_factory=Counter)
    cut_off: Counter[str] = field(default_factory=Counter)
    amid: Counter[str] = field(default_factory=Counter)
    mixed: Counter[str] = field(default_factory=Counter)
    generations: int = 0


class Operation(threading.Thread):
    """One call, begun in a thread of its own."""

    def __init__(self, client: ApolloClient, name: str):
        super().__init__(daemon=True)
        self._client, self._name = client, name
        self._begun = threading.Event()
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.start()
        assert self._begun.wait(HANG)

    def run(self) -> None:
        began = time.monotonic()
        self._begun.set()
        try:
            OPERATIONS[self._name](self._client)
        except BaseException as error:
            self.error = error
        self.seconds = time.monotonic() - began

    def ended(self) -> bool:
        """Whether its answer came, or else only the news that the server went. Waits for either."""
        self.join(HANG)
        assert not self.is_alive()
        assert self.error is None or isinstance(self.error, ApolloError), self.error
        return self.error is None


def kill_again_and_again(
    server: ServerProcess, model: Path, kills: int, seed: int, look: Callable[[int], None]
) -> Outcome:
    """Kills in each operation in turn; after each kill requires that nothing is torn.

    Args:
        look: called after each kill, while no server runs and nothing was recovered, with how
            many there were.
    """
    draw, outcome = random.Random(seed), Outcome()
    with ApolloClient(server.address) as client:
        _train(client, draw)
        client.sync()
        client.create_snapshot("anchor")
    seconds = _measure(server, draw)
    for number in range(kills):
        name, second = list(OPERATIONS)[number % len(OPERATIONS)], number // len(OPERATIONS) % 2
        aimed = second == 1 and name in WRITERS
        after = draw.uniform(0, WRITE_SECONDS if aimed else LATEST * seconds[name])
        before, ended = _kill_in(server, model, name, draw, after, aimed)
        outcome.kills[name] += 1
        outcome.cut_off[name] += not ended
        outcome.amid[name] += not ended and _amid(before, _files(server, model))
        look(number + 1)
        found = _digests(model)
        server.start()
        server.wait_attached()
        with ApolloClient(server.address) as client:
            _require_whole(client, outcome)
            assert _digests(model) == found, "recovery left the directory as every reader found it"
            _require_next_sync(client, outcome, name, draw)
        how = "ended" if ended else "cut off"
        when = f"{after * 1e3:.0f} ms{' of its write' if aimed else ''}"
        print(f"{number + 1} of {kills}: {name} {how} after {when}", flush=True)
    return outcome


def _measure(server: ServerProcess, draw: random.Random) -> dict[str, float]:
    """How long each operation takes in a server that is as new as those that are killed."""
    seconds = defaultdict[str, list[float]](list)
    for _ in range(MEASURED):
        server.end()
        server.start()
        server.wait_attached()
        with ApolloClient(server.address) as client:
            for name in OPERATIONS:
                _train(client, draw)
                operation = Operation(client, name)
                assert operation.ended(), operation.error
                seconds[name].append(operation.seconds)
    usual = {name: median(each) for name, each in seconds.items()}
    print("unkilled:", ", ".join(f"{n} {s * 1e3:.0f} ms" for n, s in usual.items()), flush=True)
    return usual


def _train(client: ApolloClient, draw: random.Random) -> None:
    # Another text each time: from one anchor the same text makes the same model again.
    sample = {"context_ids": [60, 61, 62], "continuation_ids": draw.sample(range(30, 250), 4)}
    *_, last = client.train([sample], epochs=draw.choice([1, 2, 3]), lr=1e-3)
    assert not last.finished.HasField("failure"), last.finished.failure


def _kill_in(
    server: ServerProcess,
    model: Path,
    name: str,
    draw: random.Random,
    after: float,
    aimed: bool,
) -> tuple[Files, bool]:
    """Returns the files of before the operation, and whether it had ended.

    Args:
        aimed: `after` counts from the mark that it writes to live weights, not from the call.
    """
    with ApolloClient(server.address) as client:
        _train(client, draw)
        before = _files(server, model)
        operation = Operation(client, name)
        while aimed and operation.is_alive() and not any(_marks(server)):
            time.sleep(0.0005)
        time.sleep(after)
        server.end(signal.SIGKILL)
        return before, operation.ended()


def _files(server: ServerProcess, model: Path) -> Files:
    """All that is kept beside the directory, and the mark of a restore, each with its time."""
    state = model.with_name(f".{model.name}.apollo")
    return {path: path.stat().st_mtime_ns for path in (*state.rglob("*"), *_marks(server))}


def _marks(server: ServerProcess) -> Iterator[Path]:
    return server.folder.glob(f"models/*/{CUT_OFF}")


def _amid(before: Files, after: Files) -> bool:
    """Whether something was begun that is not finished: it is there, under a name for a while."""
    begun = {path for path, time in after.items() if before.get(path) != time}
    if any(path.name == "manifest.json" for path in begun):
        # Then a sync was done; a folder for what is next is the old directory.
        return False
    names = {part for path in begun for part in path.parts}
    return any(name.startswith("tmp-") or name in ("manifest.next.json", CUT_OFF) for name in names)


def _digests(model: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in model.iterdir()}


def _require_whole(client: ApolloClient, outcome: Outcome) -> None:
    verified = client.verify(full=True)
    assert not verified.differences, verified
    outcome.generations = max(outcome.generations, verified.generation)
    for snapshot in client.list_snapshots().snapshots:
        assert client.get_snapshot(snapshot.snapshot_id) == snapshot


def _require_next_sync(
    client: ApolloClient, outcome: Outcome, name: str, draw: random.Random
) -> None:
    try:
        client.sync()
    except FailedPrecondition as error:
        assert error.reason == "WEIGHTS_POISONED", error
        assert name in WRITERS
        outcome.mixed[name] += 1
        client.restore("anchor")
        _train(client, draw)
        client.sync()
    assert not client.verify(full=True, live=True).differences
