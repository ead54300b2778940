"""`kill -9` around a restore and an undo, and in a first write: nothing of two models is mixed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_client import ApolloClient
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.apollo_state import FILE_NAME, OPTIMIZER_KEY, load_state
from tests.server_process import ServerProcess, served
from tests.soak.kill_checkpoints import Operation
from tests.waiting import wait_until

SAMPLE = {"context_ids": [60, 61, 62], "continuation_ids": [70, 71, 72, 73]}
SEED = 20412
KILLS = 20


def die_in_a_step() -> None:
    """In the server's process: it dies by SIGKILL when two parameters of a step are written."""
    from apollo_trainer.optim import together

    step_parameter, written = together.step_parameter, list[Any]()

    def killed(job: Any) -> Any:
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(job)
        return step_parameter(job)

    together.step_parameter = killed


def die_in_a_probe() -> None:
    """In the server's process: it dies by SIGKILL when vLLM's weights hold a probe's change."""
    from apollo_trainer.weights.sidecar import Sidecar

    probe = Sidecar.probe

    def killed(*arguments: Any) -> Any:
        probe(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    Sidecar.probe = killed  # type: ignore[assignment]


@pytest.fixture
def server(model_folder: Path) -> Iterator[ServerProcess]:
    with served(model_folder, APOLLO_LEASE_SECONDS="1") as started:
        yield started


def learn(client: ApolloClient, epochs: int, **options: Any) -> list[float]:
    events = list(client.train([SAMPLE], epochs=epochs, lr=1e-2, **options))
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED, events[-1].finished.failure
    return [event.step.loss for event in events if event.HasField("step")]


def on_disk(server: ServerProcess) -> dict[str, torch.Tensor]:
    """The Apollo state that the server has saved, its step among it."""
    (path,) = server.folder.glob(f"models/*/{FILE_NAME}")
    tensors, description = load_state(path) or ({}, {})
    return tensors | {"step_count": torch.tensor(description[OPTIMIZER_KEY]["step_count"])}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_killed_right_after_its_answer_a_restore_and_an_undo_stay_whole(
    server: ServerProcess,
) -> None:
    weights = server.engine.model.values
    with ApolloClient(server.address) as client:
        learn(client, 2)
        client.create_snapshot("anchor")
        anchor, state = weights(), on_disk(server)
        losses = learn(client, 3)
        for back in (lambda: client.restore("anchor"), lambda: client.undo(3)):
            result = back()
            server.end(signal.SIGKILL)
            assert same(weights(), anchor)
            assert same(on_disk(server), state)
            server.start()
            status = server.wait_attached()
            assert status.optimizer_step == 2
            assert status.weight_version == result.weight_version
            assert "Runs are refused" not in status.attachment_detail
            assert learn(client, 3) == losses


def test_killed_in_a_probe_vllm_goes_on_as_soon_as_after_any_kill(server: ServerProcess) -> None:
    values, engine = server.engine.model.values, server.engine.engine
    loaded = values()
    server.end()
    server.start(die_in_a_probe)
    server.wait_ended()
    assert engine.leases.active and not same(values(), loaded)
    began = time.monotonic()
    server.start()
    server.wait_attached()
    assert same(values(), loaded)
    # Its lease is the setting's, 1 s here; the rest is the next attachment.
    assert time.monotonic() - began < 15


def test_killed_in_the_first_write_of_a_live_run_it_attaches_again(server: ServerProcess) -> None:
    loaded, engine = server.engine.model.values(), server.engine.engine
    server.end()
    server.start(die_in_a_step)
    server.wait_attached()
    assert engine.manifest().as_loaded
    with ApolloClient(server.address) as client:
        Training(client)
        server.wait_ended()
        assert not same(server.engine.model.values(), loaded)
        server.start()
        assert server.wait_attached().optimizer_step == 0
        wait_until(lambda: not engine.leases.active, "the end of the dead server's lease")
        assert engine.weight_version == 1, "an update that nobody told of"
        assert server.engine.calls == ["reset caches"], "and vLLM was never paused"
        (run,) = client.list_runs().runs
        (*_, last) = client.watch_run(run.run_id)
        assert last.finished.next_step_in_doubt
        wait_until(lambda: client.status().weight_version == 1, "the version")
        learn(client, 1)


class Training(Operation):
    """A LIVE run that its server does not outlive."""

    def __init__(self, client: ApolloClient):
        super().__init__(client, "live run")

    def run(self) -> None:
        self._begun.set()
        try:
            list(self._client.train([SAMPLE], lr=1e-2, coherence="live"))
        except Exception as error:
            self.error = error


@pytest.mark.long
@pytest.mark.timeout(600)
def test_twenty_kills_around_a_restore_or_an_undo_mix_nothing(server: ServerProcess) -> None:
    draw, weights = random.Random(SEED), server.engine.model.values
    refused = 0
    with ApolloClient(server.address) as client:
        learn(client, 2)
        client.create_snapshot("anchor")
        anchor, losses = weights(), learn(client, 1)
        later = weights()
        seconds = {"restore": measure(client, "restore"), "undo": measure(client, "undo")}
        for _ in range(KILLS):
            # From the same weights and moments one more step is the same one.
            client.restore("anchor")
            assert learn(client, 1) == losses
            assert same(weights(), later)
            name = draw.choice(["restore", "undo"])
            operation = Operation(client, name)
            time.sleep(draw.uniform(0, 1.2 * seconds[name]))
            server.end(signal.SIGKILL)
            ended = operation.ended()
            server.start()
            status = server.wait_attached()
            if "Runs are refused" in status.attachment_detail:
                assert not ended
                refused += 1
                continue
            assert same(weights(), anchor) or (same(weights(), later) and not ended)
            assert status.optimizer_step == (2 if same(weights(), anchor) else 3)
            if status.optimizer_step == 2:
                assert learn(client, 1) == losses
    print(f"{KILLS} kills, {refused} refused until a restore")


def measure(client: ApolloClient, name: str) -> float:
    """Seconds that it takes, after one step from the anchor."""
    client.restore("anchor")
    learn(client, 1)
    operation = Operation(client, name)
    assert operation.ended(), operation.error
    return operation.seconds
