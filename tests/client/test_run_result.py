"""A run's id at once, and what it came to, from the stream that tells its events."""

from __future__ import annotations

import sys
from dataclasses import FrozenInstanceError
from typing import Any
from xml.etree import ElementTree

import pytest

from apollo_client import ApolloClient
from apollo_grpc.errors import (
    Aborted,
    ApolloError,
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    Unavailable,
)
from apollo_grpc.v1 import training_pb2 as pb
from tests.client.scripted_server import Scripted, serving

SAMPLE = ("The sea is", " deep.")
SVG = "{http://www.w3.org/2000/svg}"


def losses(events: list[pb.RunEvent]) -> list[float]:
    return [event.step.loss for event in events if event.HasField("step")]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_result_is_of_the_whole_run_however_much_was_read_before(connect, server, count) -> None:
    client = connect(server)
    run_id, told, result = client.read(count, "train", [SAMPLE], epochs=5, lr=1e-3)
    events = client.follow(run_id)
    assert told == events[:count]
    assert (result.run_id, result.state, result.steps) == (run_id, "succeeded", 5)
    assert result.losses == losses(events) and len(result.losses) == 5
    assert result.weight_version == events[-1].finished.weight_version
    assert result.failure is None and result.raise_for_failure() is result
    with pytest.raises(FrozenInstanceError):
        result.state = "failed"


def test_the_id_takes_no_event_from_who_iterates(connect, server) -> None:
    client = connect(server)
    events = client.train([SAMPLE], epochs=3)
    run_id, told, _ = client.read(len(events), "watch_run", events[0].run_id)
    assert (run_id, told) == (events[0].run_id, events)


def test_a_run_of_somebody_else_is_waited_for(connect, server) -> None:
    client = connect(server)
    run = client.call("create_run", [SAMPLE], epochs=4)
    run_id, _, result = client.read(0, "watch_run", run.run_id)
    assert (run_id, result.run_id, result.steps) == (run.run_id, run.run_id, 4)


def test_why_a_run_ended_early_is_told(connect, server) -> None:
    _, _, result = connect(server).read(0, "train", [SAMPLE], epochs=5, min_loss=99.0)
    assert (result.state, result.stopped.reason) == ("succeeded", "GUARD_MIN_LOSS")
    assert result.raise_for_failure().steps < 5


def test_what_the_server_refuses_is_raised_by_the_id_as_by_iterating(connect, server) -> None:
    with pytest.raises(InvalidArgument, match=r"samples\[0\]"):
        connect(server).read(0, "train", [("a", "")])


@pytest.mark.parametrize("told", ["run_id", "result"])
def test_a_stream_that_was_left_says_how_to_read_on(connect, server, told) -> None:
    with pytest.raises(FailedPrecondition, match="watch_run") as refused:
        connect(server).left(told, [SAMPLE])
    assert refused.value.reason == "STREAM_LEFT"


def scripted(**finished: Any) -> Any:
    """The result of a run of two steps that ends so."""
    steps = [pb.RunEvent(step=pb.RunEvent.Step(step=n, loss=3.0 - n, tokens=4)) for n in (1, 2)]
    end = pb.RunEvent(finished=pb.RunEvent.Finished(steps_done=2, **finished))
    with serving(Scripted([*steps, end])) as address, ApolloClient(address) as client:
        return client.train([SAMPLE]).result()


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("ENGINE_LOST", Unavailable),
        ("WEIGHTS_NOT_LIVE", FailedPrecondition),
        ("INTERRUPTED", Aborted),
        ("OF_A_LATER_VERSION", Aborted),
    ],
)
def test_a_failure_is_raised_as_a_call_would_raise_it(reason: str, kind: type[ApolloError]) -> None:
    notice = pb.Notice(reason=reason, message="It broke; two steps are kept.")
    result = scripted(state=pb.RUN_STATE_FAILED, failure=notice)
    assert (result.state, result.failure, result.losses) == ("failed", notice, [2.0, 1.0])
    with pytest.raises(kind, match="It broke; two steps are kept") as raised:
        result.raise_for_failure()
    assert (raised.value.reason, raised.value.metadata) == (reason, {"run_id": "r1"})
    assert type(raised.value) is kind


def test_a_run_that_was_cancelled_or_taken_back_is_no_success() -> None:
    with pytest.raises(Cancelled, match="its 2 steps are in the weights"):
        scripted(state=pb.RUN_STATE_CANCELLED).raise_for_failure()
    lost = pb.Notice(reason="PROBES_LOST", message="3 probes were lost.")
    with pytest.raises(Aborted, match="3 probes were lost"):
        scripted(state=pb.RUN_STATE_REJECTED, failure=lost).raise_for_failure()


def test_losses_are_drawn_as_one_line(tmp_path) -> None:
    result = scripted(state=pb.RUN_STATE_SUCCEEDED)
    path = result.plot(tmp_path / "losses.svg")
    picture = ElementTree.parse(path).getroot()
    lines = [each.get("d") for each in picture.iter(f"{SVG}path")]
    assert lines[1] == "M64.0 32.0L64.0 32.0L704.0 328.0"
    words = [each.text for each in picture.iter(f"{SVG}text")]
    assert words == ["Run r1: loss in nats a token", "2", "1", "step 1", "step 2"]


def test_a_run_without_steps_draws_nothing(tmp_path) -> None:
    end = pb.RunEvent(finished=pb.RunEvent.Finished())
    with serving(Scripted([end])) as address, ApolloClient(address) as client:
        result = client.train([SAMPLE]).result()
    with pytest.raises(FailedPrecondition, match="took no step"):
        result.plot(tmp_path / "losses.svg")
    assert result.losses == [] and not list(tmp_path.iterdir())


def test_a_frame_has_a_row_a_step() -> None:
    pytest.importorskip("pandas")
    frame = scripted(state=pb.RUN_STATE_SUCCEEDED).to_pandas()
    assert list(frame.step) == [1, 2] and list(frame.loss) == [2.0, 1.0]
    assert list(frame.tokens) == [4, 4] and "forward_seconds" in frame


def test_without_pandas_the_words_say_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        scripted(state=pb.RUN_STATE_SUCCEEDED).to_pandas()
