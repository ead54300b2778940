"""Both clients, over real sockets: the same calls, the same answers, the same errors."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from apollo_client import ApolloClient, AsyncApolloClient, run_spec
from apollo_grpc.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unavailable,
)
from apollo_grpc.v1 import training_pb2 as pb
from tests.client.scripted_server import Scripted, serving
from tests.waiting import HANG, wait_until

SAMPLE = ("The sea is", " deep.")


def steps(events) -> list[pb.RunEvent.Step]:
    return [event.step for event in events if event.HasField("step")]


def test_a_run_tells_every_step_and_ends_with_finished(connect, server):
    events = connect(server).train([SAMPLE, SAMPLE], epochs=3, lr=1e-3)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert [step.step for step in steps(events)] == [1, 2, 3, 4, 5, 6]
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED


def test_options_reach_the_run(connect, server):
    options = {"lr": 3e-4, "samples_per_step": 2, "epochs": 2, "warmup_steps": 2, "seed": 1}
    told = steps(connect(server).train([SAMPLE] * 4, **options))
    assert [step.learning_rate for step in told] == pytest.approx([1.5e-4, 3e-4, 3e-4, 3e-4])


def test_a_run_goes_on_when_its_caller_leaves(connect, server):
    client = connect(server)
    first = client.begin([SAMPLE], epochs=30)
    wait_until(lambda: not client.call("status").active_run_id, "the end of the run")
    assert client.call("status").optimizer_step == first.optimizer_step + 29


def test_a_subscriber_gets_every_step_of_somebody_elses_run(connect, server):
    told: list[pb.RunEvent] = []

    def somebody_trains() -> None:
        with ApolloClient(server) as other:
            told.extend(other.train([SAMPLE], epochs=4))

    updates = connect(server).watch_until(
        lambda update: told and update.event == told[-1], somebody_trains
    )
    assert updates[0].status.model
    seen = [update.event for update in updates if update.event.run_id == told[0].run_id]
    assert seen == told


def test_sync_tells_its_progress_and_its_result(connect, server):
    client, told = connect(server), []
    client.train([SAMPLE], lr=1e-2)
    result = client.call("sync", told.append)
    assert (result.files_written, told[-1].bytes_done) == (
        ["model.safetensors"],
        told[-1].bytes_total,
    )


def test_the_same_request_is_the_same_run(connect, server):
    client, request_id = connect(server), uuid.uuid4().hex
    events = client.train([SAMPLE], epochs=2, request_id=request_id)
    assert client.train([SAMPLE], epochs=2, request_id=request_id) == events
    with pytest.raises(AlreadyExists):
        client.train([SAMPLE], epochs=3, request_id=request_id)


def test_without_an_id_of_the_callers_each_run_is_its_own(connect, server):
    client = connect(server)
    assert client.train([SAMPLE])[0].run_id != client.train([SAMPLE])[0].run_id


def test_a_run_is_found_again(connect, server):
    client = connect(server)
    events = client.train([SAMPLE], epochs=4)
    run_id = events[0].run_id
    assert client.follow(run_id) == events
    assert client.follow(run_id, 3) == events[3:]
    run = client.call("get_run", run_id)
    assert (run.run_id, run.steps_done, run.spec.epochs) == (run_id, 4, 4)
    page = client.call("list_runs", 1, "", ["succeeded"])
    assert [found.run_id for found in page.runs] == [run_id]
    assert client.call("list_runs", 1, page.next_page_token, ["succeeded"]).runs[0] != page.runs[0]


def test_a_run_is_created_named_chosen_and_deleted(connect, server):
    client, team = connect(server), uuid.uuid4().hex
    options = {"epochs": 3, "name": "mine", "labels": {"team": team}, "request_id": team}
    runs = [client.call("create_run", [SAMPLE], **options) for _ in range(2)]
    assert runs[0].run_id == runs[1].run_id
    events = client.follow(runs[0].run_id)
    later = client.train([SAMPLE], labels={"team": team})[0].run_id
    ids = [runs[0].run_id, later]
    page = client.call("list_runs", labels={"team": team}, oldest_first=True)
    assert [found.run_id for found in page.runs] == ids
    page = client.call("list_runs", labels={"team": team}, name="mine")
    assert [found.last_loss for found in page.runs] == [steps(events)[-1].loss]
    run = client.call("get_run", ids[0], samples=True)
    assert (run.request_id, len(run.spec.samples)) == (team, 1)
    assert not client.call("get_run", ids[0]).spec.samples
    for run_id in ids:
        client.call("delete_run", run_id)
    assert not client.call("list_runs", labels={"team": team}).runs
    with pytest.raises(NotFound):
        client.call("delete_run", ids[0])


def test_a_run_for_other_weights_is_refused(connect, server):
    client = connect(server)
    client.train([SAMPLE])
    version = client.call("status").weight_version
    with pytest.raises(Aborted) as refused:
        client.call("create_run", [SAMPLE], expected_weight_version=version - 1)
    assert refused.value.metadata == {"weight_version": str(version)}


def test_all_runs_are_followed_from_now_on_or_from_what_is_known(connect, server):
    client, trained = connect(server), []

    def somebody_trains() -> int:
        with ApolloClient(server) as other:
            trained.extend([*other.train([SAMPLE]), *other.train([SAMPLE], epochs=2)])
        return len(trained)

    first, *told = client.follow_all(None, somebody_trains)
    assert not first.HasField("event")
    assert [each.event for each in told] == trained
    again = client.follow_all(told[1].revision, lambda: len(trained) - 3)
    assert again == told[2:]
    with pytest.raises(OutOfRange):
        client.follow_all(told[-1].revision + 1000, lambda: 0)


@pytest.mark.parametrize(
    ("options", "field"),
    [({"labels": 3}, "labels"), ({"labels": {"a": 3}}, "labels[a]"), ({"name": 3}, "name")],
)
def test_a_label_that_is_no_text_is_refused_before_a_call(connect, options, field):
    client = connect("unix:/nowhere/training.sock")
    for call in (
        lambda: client.train([SAMPLE], **options),
        lambda: client.call("list_runs", **options),
    ):
        with pytest.raises(InvalidArgument) as refused:
            call()
        assert refused.value.violations[0].field == field


def test_a_run_is_cancelled(connect, server):
    client = connect(server)
    request_id = uuid.uuid4().hex
    client.begin([SAMPLE], epochs=100_000, min_loss=0, request_id=request_id)
    (run,) = client.call("list_runs", 1, "", ["running"]).runs
    client.call("cancel_run", run.run_id)
    *_, last = client.follow(run.run_id)
    assert last.finished.state == pb.RUN_STATE_CANCELLED


def test_an_unknown_run_and_an_unknown_state_are_told(connect, server):
    client = connect(server)
    for call in (client.follow, lambda run_id: client.call("get_run", run_id)):
        with pytest.raises(NotFound):
            call("none")
    with pytest.raises(InvalidArgument, match="states"):
        client.call("list_runs", 0, "", ["lost"])


def test_a_refusal_names_the_field(connect, server):
    with pytest.raises(InvalidArgument) as refused:
        connect(server).train([("a", "b"), ("a", "")])
    (violation,) = refused.value.violations
    assert violation.field == "spec.samples[1].text.continuation"


CHAT_OF_TWO = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 1},
        {"role": "assistant", "content": "c"},
    ]
}


def test_a_refusal_names_the_callers_own_item_where_one_was_several_samples(connect, server):
    with pytest.raises(InvalidArgument) as refused:
        connect(server).train([CHAT_OF_TWO, SAMPLE, ("a", ""), ("b", "")])
    fields = [violation.field for violation in refused.value.violations]
    assert fields == [f"spec.samples[{index}].text.continuation" for index in (2, 3)]
    assert refused.value.message.startswith(fields[0])
    assert refused.value.reason == "SAMPLE_INVALID"


def test_more_samples_than_a_run_takes_are_refused_with_those_that_fit(connect, server):
    with pytest.raises(InvalidArgument, match="has 10001 samples; a run takes") as refused:
        connect(server).train([CHAT_OF_TWO, *[SAMPLE] * 9_999])
    assert "up to spec.samples[9998] they fit" in refused.value.message
    with pytest.raises(InvalidArgument, match=r"up to spec.samples\[9998\] they fit"):
        connect(server).train([*[SAMPLE] * 9_999, CHAT_OF_TWO])


MIB_OF_TEXT = ("a" * 2**20, "b")


def test_more_bytes_than_a_request_holds_are_refused_before_it_is_sent(connect):
    client = connect("unix:/nowhere/training.sock")
    with pytest.raises(InvalidArgument, match=r"holds 70\.0 MiB of samples") as refused:
        client.train([MIB_OF_TEXT] * 70)
    assert "takes at most 63.9 MiB; up to spec.samples[62] they fit" in refused.value.message
    assert (refused.value.reason, len(refused.value.violations)) == ("TOO_MANY_SAMPLES", 1)
    with pytest.raises(InvalidArgument, match=r"spec.samples\[0\] does not fit: shorten it"):
        client.train([("a" * 2**26, "b")])
    with pytest.raises(InvalidArgument, match=r"up to spec.samples\[62\] they fit"):
        client.call("train_spec", run_spec([MIB_OF_TEXT] * 64, {}))


def test_as_many_bytes_as_are_taken_reach_the_server(connect, server):
    rest = 2**20 - 2**16 - 5000
    with pytest.raises(InvalidArgument) as refused:
        connect(server).train([to_chat(2**20)] * 63 + [to_chat(rest)])
    assert refused.value.violations[0].field == "spec.samples[0].chat.messages"


def to_chat(size: int) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "a" * size}]}


def test_coherence_guards_and_limits_reach_the_run(connect, server):
    client = connect(server)
    options = {
        "coherence": "live",
        "cache_policy": "keep",
        "max_loss": 50.0,
        "max_wall_time": 60.5,
        "evaluate": True,
        "dry_run": True,
    }
    events = list(client.train([SAMPLE], **options))
    assert [e.evaluated.after_training for e in events if e.HasField("evaluated")] == [False, True]
    spec = client.call("get_run", events[0].run_id).spec
    assert spec.coherence.mode == pb.COHERENCE_MODE_LIVE
    assert spec.coherence.cache_policy == pb.CACHE_POLICY_KEEP
    assert (spec.guard.max_loss, spec.max_wall_time.ToMilliseconds()) == (50.0, 60500)
    assert spec.dry_run and spec.evaluate


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"lrr": 1.0}, "lrr"),
        ({"epochs": "three"}, "epochs"),
        ({"coherence": "paused"}, "coherence"),
        ({"cache_policy": 3}, "cache_policy"),
        ({"max_wall_time": float("nan")}, "max_wall_time"),
    ],
)
def test_an_option_that_no_run_has_is_refused_before_a_call(connect, options, field):
    with pytest.raises(InvalidArgument) as refused:
        connect("unix:/nowhere/training.sock").train([SAMPLE], **options)
    assert refused.value.violations[0].field == field


@pytest.mark.parametrize("call", ["status", "sync"])
def test_without_a_server_the_error_says_what_to_start(connect, state_dir, call):
    address = f"unix:{state_dir}/training.sock"
    with pytest.raises(Unavailable, match="apollo up") as error:
        connect(address).call(call)
    assert error.value.reason == "SERVER_UNREACHABLE"
    assert address in error.value.message


def test_a_stream_without_a_server_raises_the_same_error(connect, state_dir):
    with pytest.raises(Unavailable, match="apollo up"):
        connect(f"unix:{state_dir}/training.sock").train([SAMPLE])


def test_what_a_server_cannot_do_now_is_told_in_its_own_words(connect):
    scripted = Scripted()
    scripted.refusal = Unavailable("The connection to vLLM's sidecar was given up.")
    with serving(scripted) as address, pytest.raises(Unavailable) as told:
        connect(address).train([SAMPLE])
    assert (told.value.reason, told.value.message) == ("UNAVAILABLE", scripted.refusal.message)
    assert len(scripted.asked) == 1


def test_a_stream_that_was_left_ends(connect, server):
    client = connect(server)
    assert client.after_leaving() == []


@pytest.mark.parametrize("call", ["status", "sync", "train", "watch_run", "watch"])
def test_a_closed_client_says_so(connect, server, call):
    client = connect(server)
    client.call("close")
    arguments = {"train": [[SAMPLE]], "watch_run": ["none"]}.get(call, [])
    with pytest.raises(FailedPrecondition, match="client is closed: make another") as refused:
        client.call(call, *arguments)
    assert refused.value.reason == "CLIENT_CLOSED"


def test_streams_end_when_their_client_closes(connect, server):
    assert connect(server).after_closing() == []


def test_an_asyncio_client_is_refused_without_a_loop_and_on_another(server):
    with pytest.raises(FailedPrecondition, match="on a running event loop") as refused:
        AsyncApolloClient(server)
    assert refused.value.reason == "NO_EVENT_LOOP"

    async def make() -> tuple[AsyncApolloClient, Any]:
        client = AsyncApolloClient(server)
        return client, client.watch()

    async def use(call: Callable[[], Any]) -> None:
        await call()

    with asyncio.Runner() as own:
        client, stream = own.run(make())
        for call in (client.status, client.sync, stream.__anext__, client.close):
            with pytest.raises(FailedPrecondition) as refused:
                asyncio.run(use(call))
            assert refused.value.reason == "WRONG_EVENT_LOOP"
        for begin in (client.watch, lambda: client.train([SAMPLE])):
            with pytest.raises(FailedPrecondition) as refused:
                begin()
            assert refused.value.reason == "NO_EVENT_LOOP"
        assert own.run(client.status()).model
        own.run(client.close())


def test_a_call_in_flight_when_its_client_closes_is_told_and_a_cancelled_task_stays_cancelled(
    state_dir,
):
    async def close_meanwhile(client: AsyncApolloClient) -> None:
        call = asyncio.ensure_future(client.status())
        await asyncio.sleep(0)
        await client.close()
        await call

    async def cancel_meanwhile(client: AsyncApolloClient) -> None:
        call = asyncio.ensure_future(client.status())
        await asyncio.sleep(0)
        call.cancel()
        await client.close()
        await call

    async def run(act: Callable[[AsyncApolloClient], Any]) -> None:
        await act(AsyncApolloClient(address))

    with silent_server(state_dir) as address:
        with pytest.raises(FailedPrecondition, match="client is closed"):
            asyncio.run(run(close_meanwhile))
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(run(cancel_meanwhile))


@contextmanager
def silent_server(folder: Path) -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "silent.sock"))
        listener.listen()
        yield f"unix:{folder}/silent.sock"


FORKED = """
import os, sys
from apollo_client import ApolloClient
from apollo_grpc.errors import ApolloError

client = ApolloClient(sys.argv[1])
stream = client.watch()
next(stream)
if os.fork():
    _, status = os.wait()
    client.status()
    sys.exit(status)
for call in (client.status, lambda: next(stream), client.watch):
    try:
        call()
    except ApolloError as error:
        print(error.reason, flush=True)
client.close()
"""


def test_a_client_in_a_forked_process_says_so_and_the_first_goes_on(server):
    command = [sys.executable, "-c", FORKED, server]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stdout) == (0, "CLIENT_FORKED\n" * 3), done.stderr


def test_a_client_is_shared_by_threads_and_closed_by_one(server):
    client, ended = ApolloClient(server), threading.Event()
    stream = client.watch()
    next(stream)

    def follow() -> None:
        for _ in stream:  # What earlier runs of this server still tell.
            pass
        ended.set()

    follower = threading.Thread(target=follow)
    follower.start()
    client.close()
    follower.join(HANG)
    assert ended.is_set()


def test_a_job_that_waits_is_stopped_by_its_request_id(connect, server):
    with ApolloClient(server) as other:
        run = other.train([SAMPLE], epochs=100_000, min_loss=0)
        run_id, request_id = next(run).run_id, uuid.uuid4().hex
        wait_until(lambda: other.status().active_run_id == run_id, "the run")

        def stop() -> None:
            wait_until(lambda: _stopped(other, request_id), "the job")

        stopper = threading.Thread(target=stop)
        stopper.start()
        with pytest.raises(Cancelled) as caught:
            connect(server).call("sync", request_id=request_id)
        stopper.join()
        assert caught.value.reason == "JOB_CANCELLED"
        with pytest.raises(NotFound):
            other.cancel_operation("unknown")
        other.cancel_run(run_id)


def _stopped(client: ApolloClient, request_id: str) -> bool:
    try:
        return client.cancel_operation(request_id=request_id) == "CANCELLED"
    except NotFound:
        return False
