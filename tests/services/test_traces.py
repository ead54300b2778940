"""One trace from the client's span to the run's, through the queue, as a collector receives it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from apollo_client import ApolloClient, AsyncApolloClient
from apollo_grpc.v1 import training_pb2 as pb
from tests import otlp
from tests.engine_double import EngineDouble
from tests.otlp import Receiver
from tests.server_process import ServerProcess
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def server(tiny_model: Path, receiver: Receiver) -> Iterator[ServerProcess]:
    """A server whose spans go to the receiver, by an SDK that OTEL_* variables set up."""
    with tempfile.TemporaryDirectory(prefix="apollo-") as folder:
        started = ServerProcess(Path(folder), **receiver.environment())
        engine = EngineDouble(tiny_model, f"unix:{folder}/sidecar.sock")
        started.start(before=otlp.instrument)
        started.wait_attached()
        yield started
        started.end()
        engine.stop()


@pytest.fixture
def tracer(receiver: Receiver) -> Any:
    provider = TracerProvider()
    exporter = OTLPSpanExporter(receiver.endpoint, insecure=True)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider.get_tracer("test")


def attributes(span: Any) -> dict[str, Any]:
    values = {each.key: each.value for each in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


def children(receiver: Receiver, parent: Any) -> list[str]:
    """Names of the spans within one."""
    within = [span for span in receiver.spans() if span.parent_span_id == parent.span_id]
    assert {span.trace_id for span in within} <= {parent.trace_id}
    return sorted(span.name for span in within)


def run_span(receiver: Receiver, run_id: str) -> Any:
    """The span of a run, once it has come."""

    def its() -> list[Any]:
        found = [span for span in receiver.spans() if span.name == "run"]
        return [span for span in found if attributes(span)["apollo.run_id"] == run_id]

    wait_until(its, "the span of the run")
    (found,) = its()
    return found


def spec(**fields: Any) -> pb.RunSpec:
    tokens = pb.TokenSample(context_ids=[60, 61, 62], continuation_ids=[70, 71, 72, 73])
    fields.setdefault("guard", pb.Guard(min_loss=0))
    return pb.RunSpec(samples=[pb.Sample(tokens=tokens)], **fields)


def test_runs_are_within_their_callers_spans_over_the_queue(
    server: ServerProcess, receiver: Receiver, tracer: Any
) -> None:
    paused, ids = pb.Coherence(mode=pb.COHERENCE_MODE_PAUSE_RUN), dict[str, str]()
    with ApolloClient(server.address) as client:
        for name in ("one", "two", "three"):
            # The first keeps the others waiting.
            with tracer.start_as_current_span(name):
                ids[name] = next(client.train_spec(spec(epochs=9, coherence=paused))).run_id
        list(client.watch_run(ids["three"]))
    for name, run_id in ids.items():
        (caller,), run = receiver.wait_for(name, 1), run_span(receiver, run_id)
        assert (run.trace_id, run.parent_span_id) == (caller.trace_id, caller.span_id)
        assert attributes(run)["apollo.state"] == "RUN_STATE_SUCCEEDED"
        assert attributes(run)["apollo.steps"] == 9
        assert attributes(run)["apollo.paused_seconds"] > 0
        # Never one a step.
        assert children(receiver, run) == ["pause", "save"]


async def test_an_operation_is_within_its_callers_span(
    server: ServerProcess, receiver: Receiver, tracer: Any
) -> None:
    async with AsyncApolloClient(server.address) as client:
        with tracer.start_as_current_span("syncing"):
            await client.sync()
    (syncing,) = receiver.wait_for("syncing", 1)
    receiver.wait_for("sync", 1)
    assert children(receiver, syncing) == ["sync"]


async def test_a_run_that_fails_is_marked_and_says_its_reason_alone(
    server: ServerProcess, receiver: Receiver
) -> None:
    async with AsyncApolloClient(server.address) as client:
        asked = spec(guard=pb.Guard(max_loss=1e-9))
        told = [event async for event in client.train_spec(asked)]
    failed = run_span(receiver, told[-1].run_id)
    assert failed.status.code == failed.status.STATUS_CODE_ERROR
    assert not failed.status.message and not failed.events
    assert attributes(failed)["apollo.reason"] == told[-1].finished.failure.reason
    # Its caller had no span.
    assert not failed.parent_span_id
