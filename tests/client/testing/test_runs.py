"""What runs of a fake server play, and what their callers see of it."""

from __future__ import annotations

from typing import Any

import pytest

from apollo_client import ApolloClient
from apollo_client.testing import FakeServer, Script
from apollo_grpc.errors import AlreadyExists, InvalidArgument, ResourceExhausted
from apollo_grpc.v1 import training_pb2 as pb

SAMPLES = [("The sea is", " deep."), ("The sky is", " blue.")]
ENDLESS = 100_000


def losses(client: ApolloClient, **options: Any) -> list[float]:
    return [e.step.loss for e in client.train(SAMPLES, **options) if e.HasField("step")]


def end(client: ApolloClient, **options: Any) -> pb.RunEvent.Finished:
    *_, last = client.train(SAMPLES, **options)
    return last.finished


def test_each_run_plays_the_losses_anew_and_the_last_one_stays(
    server: FakeServer, client: ApolloClient
) -> None:
    server.play(losses=[3.0, 2.0, 1.0])
    assert losses(client) == [3.0, 2.0]
    assert losses(client, epochs=2) == [3.0, 2.0, 1.0, 1.0]
    assert losses(client, samples_per_step=2, epochs=3) == [3.0, 2.0, 1.0]


def test_a_scripted_failure_keeps_the_steps_before(
    server: FakeServer, client: ApolloClient
) -> None:
    server.play(fail_with=("GUARD_MAX_GRAD_NORM", "too steep"), fail_at_step=3)
    found = end(client, epochs=2)
    assert (found.state, found.steps_done) == (pb.RUN_STATE_FAILED, 2)
    assert found.failure == pb.Notice(reason="GUARD_MAX_GRAD_NORM", message="too steep")
    assert client.status().weight_version == 2
    server.play()
    assert end(client).state == pb.RUN_STATE_SUCCEEDED


@pytest.mark.parametrize(
    ("played", "options", "reason", "steps"),
    [
        ([2.0, float("nan")], {}, "NONFINITE_LOSS", 1),
        ([2.0, 9.0], {"max_loss": 5.0}, "GUARD_MAX_LOSS", 1),
    ],
)
def test_losses_that_a_server_refuses_end_the_run(
    played: list[float],
    options: dict[str, Any],
    reason: str,
    steps: int,
    server: FakeServer,
    client: ApolloClient,
) -> None:
    server.play(losses=played)
    found = end(client, **options)
    assert (found.failure.reason, found.steps_done) == (reason, steps)


def test_a_run_that_knows_its_samples_stops(server: FakeServer, client: ApolloClient) -> None:
    server.play(losses=[1.0, 1.0, 0.01])
    found = end(client, epochs=9)
    assert (found.state, found.stopped.reason) == (pb.RUN_STATE_SUCCEEDED, "GUARD_MIN_LOSS")
    assert found.steps_done == 3


def test_probes_pass_by_the_loss_and_join_the_regression_set(
    server: FakeServer, client: ApolloClient
) -> None:
    server.play(losses=[3.0, 2.0, 0.5])
    probes = [{"prompt": "The sea is", "expected": " deep."}]
    assert end(client, probes=probes, accept_if=True).state == pb.RUN_STATE_SUCCEEDED
    kept = client.list_regression_probes().probes
    assert [probe.sample.text.continuation for probe in kept] == [" deep."]
    server.play(losses=[0.5, 2.0])
    found = end(client, accept_if={"max_failed": 1})
    assert (found.state, found.failure.reason) == (pb.RUN_STATE_REJECTED, "PROBES_LOST")
    assert client.status().optimizer_step == 2


def test_a_run_waits_for_the_one_before_and_the_queue_has_an_end() -> None:
    with FakeServer(max_queued_runs=1) as server, ApolloClient(server.address) as client:
        first = client.train(SAMPLES, epochs=ENDLESS)
        for event in first:
            if event.HasField("started"):
                break
        waiting = client.create_run(SAMPLES)
        assert waiting.state == pb.RUN_STATE_QUEUED
        with pytest.raises(ResourceExhausted) as refused:
            client.create_run(SAMPLES)
        assert refused.value.reason == "QUEUE_FULL"
        client.cancel_run(event.run_id)
        *_, last = first
        assert last.finished.state == pb.RUN_STATE_CANCELLED
        *_, last = client.watch_run(waiting.run_id)
        assert last.finished.state == pb.RUN_STATE_SUCCEEDED


def test_a_request_id_is_one_run(client: ApolloClient) -> None:
    first = client.create_run(SAMPLES, request_id="mine")
    assert client.create_run(SAMPLES, request_id="mine").run_id == first.run_id
    with pytest.raises(AlreadyExists):
        client.create_run(SAMPLES, request_id="mine", epochs=2)


def test_wrong_requests_are_refused_as_by_a_server(client: ApolloClient) -> None:
    with pytest.raises(InvalidArgument) as refused:
        client.create_run(SAMPLES, lr=-1.0)
    assert [each.field for each in refused.value.violations] == ["spec.optimizer.lr"]


def test_a_script_has_a_loss() -> None:
    with pytest.raises(ValueError, match="losses are empty"):
        Script(losses=[])
