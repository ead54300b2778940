"""`kill -9` in a run that is kept only if it is accepted: the next server takes it back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from apollo_client import ApolloClient
from apollo_grpc.errors import ApolloError
from apollo_grpc.v1 import training_pb2 as pb
from tests.server_process import ServerProcess, served
from tests.services.test_kill_restore import learn, on_disk, same

TOKENS = pb.TokenSample(context_ids=[60, 61, 62], continuation_ids=[70, 71, 72, 73])


def spec() -> pb.RunSpec:
    impossible = pb.TokenSample(context_ids=[1, 2], continuation_ids=[3, 4, 5, 6, 7, 8])
    asked = pb.Probe(sample=pb.Sample(tokens=impossible), check=pb.PROBE_CHECK_EXACT)
    return pb.RunSpec(
        samples=[pb.Sample(tokens=TOKENS)],
        epochs=3,
        optimizer=pb.OptimizerConfig(lr=1e-2),
        probes=[asked],
        accept_if=pb.AcceptIf(),
    )


def die_in_the_middle_of_the_values() -> None:
    """In the server's process: it dies when half of what is put back is there."""
    from apollo_trainer.checkpoints.snapshots.value_exchange import Exchange

    run, done = Exchange.run, list[int]()

    def killed(*arguments: Any, **options: Any) -> Any:
        if len(done) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        return run(*arguments, **options)

    Exchange.run = killed  # type: ignore[method-assign]


def die_before_the_probes() -> None:
    """In the server's process: it dies after the last step, with nothing put back."""
    from apollo_trainer.runs.evaluation import Evaluation

    Evaluation.end = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]


def die_once_the_weights_are_back() -> None:
    """In the server's process: it dies with the old weights in place, and their state not saved."""
    from apollo_trainer.engine.session import Session

    save = Session.save

    def killed(session: Any, *arguments: Any, **options: Any) -> Any:
        if session.covered.steps == 0 and session.covered.run_id:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(session, *arguments, **options)

    Session.save = killed  # type: ignore[method-assign]


def die_before_the_end_is_told() -> None:
    """In the server's process: it dies when all is back and saved, and the ledger does not know."""
    from apollo_trainer.runs.way_back import WayBack

    WayBack.forget_snapshot = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]


@pytest.fixture
def server(model_folder: Path) -> Iterator[ServerProcess]:
    with served(model_folder, APOLLO_LEASE_SECONDS="1") as started:
        yield started


@pytest.mark.parametrize(
    ("die", "state"),
    [
        (die_before_the_probes, pb.RUN_STATE_FAILED),
        (die_in_the_middle_of_the_values, pb.RUN_STATE_REJECTED),
        pytest.param(die_once_the_weights_are_back, pb.RUN_STATE_REJECTED, marks=pytest.mark.long),
        (die_before_the_end_is_told, pb.RUN_STATE_REJECTED),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_next_server_takes_it_back(
    server: ServerProcess, die: Callable[[], None], state: int
) -> None:
    weights = server.engine.model.values
    with ApolloClient(server.address) as client:
        learn(client, 2)
        client.create_snapshot("anchor")
        before, on_disk_before = weights(), on_disk(server)
        losses = learn(client, 2)
        client.restore("anchor")
    server.end()
    server.start(die)
    server.wait_attached()
    # It would wait for the server to come back.
    client = ApolloClient(server.address, retry_seconds=0)
    with client, suppress(ApolloError):
        list(client.train_spec(spec()))
    server.wait_ended()
    server.start()
    status = server.wait_attached()
    assert "Runs are refused" not in status.attachment_detail
    assert status.optimizer_step == 2
    assert same(weights(), before)
    assert same(on_disk(server), on_disk_before)
    with ApolloClient(server.address) as client:
        (run,) = client.list_runs(page_size=1).runs
        assert (run.state, run.steps_done) == (state, 0)
        assert [s.name for s in client.list_snapshots().snapshots if s.name] == ["anchor"]
        assert learn(client, 2) == losses
    assert not list(server.folder.glob("models/*/way-back.json"))
