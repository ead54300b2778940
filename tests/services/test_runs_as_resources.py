"""Runs over a real channel, as resources: created, chosen by label and name, shown, deleted."""

from __future__ import annotations

from typing import Any

import pytest

from apollo_grpc.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from apollo_grpc.v1 import training_pb2 as pb
from tests.services.test_runs import first

TOKENS = pb.TokenSample(context_ids=[60, 61, 62], continuation_ids=[70, 71, 72, 73])
SAMPLE = pb.Sample(tokens=TOKENS)


def test_a_run_is_created_at_once_and_its_events_are_there_for_whoever_asks(caller: Any) -> None:
    run = caller.create("mine", epochs=3, name="first", labels={"team": "a"})
    assert (run.request_id, run.spec.name, dict(run.spec.labels)) == (
        "mine",
        "first",
        {"team": "a"},
    )
    assert run.state in (pb.RUN_STATE_QUEUED, pb.RUN_STATE_RUNNING)
    assert not run.spec.samples
    events = caller.events_of(run.run_id)
    assert events[-1].finished.steps_done == 3


def test_a_request_id_is_of_one_run_whichever_call_it_came_with(caller: Any, error_of: Any) -> None:
    run = caller.create("mine", epochs=3)
    assert caller.create("mine", epochs=3).run_id == run.run_id
    assert caller.train("mine", epochs=3)[0].run_id == run.run_id
    assert isinstance(error_of(lambda: caller.create("mine", epochs=4)), AlreadyExists)
    other = caller.train("other", epochs=2)
    assert caller.create("other", epochs=2).run_id == other[0].run_id
    assert len(caller.list().runs) == 2


def test_what_train_refuses_is_refused(caller: Any, error_of: Any) -> None:
    assert isinstance(error_of(lambda: caller.create(epochs=-1)), InvalidArgument)
    request = pb.CreateRunRequest()
    assert isinstance(error_of(lambda: caller.training.CreateRun(request)), InvalidArgument)


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"name": "ß" * 129}, "spec.name"),
        ({"labels": {"a": "b" * 257}}, "spec.labels"),
        ({"labels": {"": "b"}}, "spec.labels"),
        ({"labels": {str(n): "" for n in range(65)}}, "spec.labels"),
    ],
)
def test_a_name_or_label_that_is_too_much_is_refused_at_its_field(
    caller: Any, error_of: Any, spec: dict[str, Any], path: str
) -> None:
    error = error_of(lambda: caller.create(**spec))
    assert isinstance(error, InvalidArgument)
    assert [violation.field for violation in error.violations] == [path]


def test_runs_are_chosen_by_labels_and_name_in_either_order(caller: Any, error_of: Any) -> None:
    made = [
        caller.create(name=f"run {n % 2}", labels={"team": "ab"[n % 2], "all": "", f"n{n}": "x"})
        for n in range(6)
    ]
    ids = [run.run_id for run in made]
    caller.events_of(ids[-1])

    def listed(**fields: Any) -> list[str]:
        found, token = list[str](), ""
        while True:
            page = caller.list(page_size=2, page_token=token, **fields)
            found += [run.run_id for run in page.runs]
            if not (token := page.next_page_token):
                return found

    oldest = {"order": pb.RUN_ORDER_OLDEST_FIRST}
    assert listed() == ids[::-1]
    assert listed(**oldest) == ids
    assert listed(labels={"team": "a"}) == ids[4::-2]
    assert listed(labels={"team": "a"}, **oldest) == ids[::2]
    assert listed(labels={"team": "a", "n2": "x"}) == [ids[2]]
    assert listed(labels={"team": "a", "n1": "x"}) == listed(labels={"team": ""}) == []
    assert listed(name="run 1", states=[pb.RUN_STATE_SUCCEEDED], **oldest) == ids[1::2]
    assert listed(name="run") == []
    # A token is of its choice alone.
    token = caller.list(page_size=1, labels={"team": "a"}).next_page_token
    for fields in ({}, {"labels": {"team": "b"}}, {"labels": {"team": "a"}, **oldest}):
        error = error_of(lambda fields=fields: caller.list(page_token=token, **fields))
        assert [violation.field for violation in error.violations] == ["page_token"]
    error = error_of(lambda: caller.list(order=7))
    assert [violation.field for violation in error.violations] == ["order"]


def test_what_holds_samples_is_shown_where_it_is_asked_for_alone(
    caller: Any, error_of: Any
) -> None:
    probe = pb.Probe(name="a probe", sample=SAMPLE, check=pb.PROBE_CHECK_EXACT)
    anchors = pb.Anchors(samples=[SAMPLE], weight=0.5)
    spec = {"anchors": anchors, "evaluation_samples": [SAMPLE], "probes": [probe], "evaluate": True}
    run_id = caller.train(**spec)[0].run_id
    full = caller.run(run_id, pb.RUN_VIEW_FULL)
    assert full.spec.samples[0] == full.spec.evaluation_samples[0] == SAMPLE
    assert (full.spec.anchors, list(full.spec.probes)) == (anchors, [probe])
    basic = caller.run(run_id, pb.RUN_VIEW_UNSPECIFIED)
    for held in (full.spec.samples, full.spec.evaluation_samples, full.spec.probes):
        del held[:]
    del full.spec.anchors.samples[:]
    assert basic == full == caller.run(run_id, pb.RUN_VIEW_BASIC) == caller.list().runs[0]
    error = error_of(lambda: caller.run(run_id, 9))
    assert [violation.field for violation in error.violations] == ["view"]


def test_a_run_holds_the_last_loss_while_it_runs(caller: Any, wait: Any) -> None:
    stream = caller.start(epochs=100_000)
    run_id = first(stream, "step").run_id
    wait(lambda: caller.run(run_id).HasField("last_loss"), "the loss")
    run = caller.run(run_id)
    assert run.last_loss > 0
    assert not run.HasField("weight_version")
    caller.cancel(run_id)
    finished = caller.events_of(run_id)[-1].finished
    assert caller.run(run_id).weight_version == finished.weight_version > 0


# --- deleted ------------------------------------------------------------------------------------


def test_a_deleted_run_is_gone_and_its_request_id_is_free(
    caller: Any, error_of: Any, state_dir: Any
) -> None:
    canary = "canary 7f3ac91b"
    text = pb.TextSample(context=canary, continuation=canary)
    spec = {"samples": [pb.Sample(text=text)], "name": canary, "labels": {canary: canary}}
    run_id = caller.train("mine", **spec)[0].run_id
    kept = caller.train("kept")
    assert said_in(state_dir, canary)
    caller.delete(run_id)
    assert said_in(state_dir, canary) == []
    for call in (caller.run, caller.events_of, caller.cancel, caller.delete):
        error = error_of(lambda call=call: call(run_id))
        assert (type(error), error.reason) == (NotFound, "RUN_NOT_FOUND")
    assert [run.run_id for run in caller.list().runs] == [kept[0].run_id]
    assert caller.events_of(kept[0].run_id) == kept
    assert caller.create("mine", epochs=2).run_id != run_id


def said_in(folder: Any, text: str) -> list[str]:
    """Files that have a text."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return [path.name for path in found if text.encode() in path.read_bytes()]


def test_a_run_that_has_not_ended_is_not_deleted(caller: Any, error_of: Any) -> None:
    active = caller.start(epochs=100_000)
    active_id = first(active, "step").run_id
    waiting_id = caller.create().run_id
    for run_id in (active_id, waiting_id):
        error = error_of(lambda run_id=run_id: caller.delete(run_id))
        assert (type(error), error.reason) == (FailedPrecondition, "RUN_NOT_ENDED")
    caller.cancel(active_id)
    assert caller.events_of(waiting_id)[-1].finished.state == pb.RUN_STATE_SUCCEEDED


# --- the expected version of the weights --------------------------------------------------------


def test_a_run_for_the_live_version_is_taken_and_one_for_an_older_one_is_not(
    caller: Any, error_of: Any
) -> None:
    version = caller.status().weight_version
    events = caller.train(expected_weight_version=version)
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    now = caller.status().weight_version
    assert now > version
    error = error_of(lambda: caller.create("mine", expected_weight_version=version))
    assert (type(error), error.reason) == (Aborted, "WEIGHT_VERSION_CHANGED")
    assert error.metadata == {"weight_version": str(now)}
    assert len(caller.list().runs) == 1
    # A request that was taken is the same run still.
    again = {"request_id": "kept", "expected_weight_version": now}
    assert caller.train(**again) == caller.train(**again)


def test_a_run_whose_version_is_another_at_its_turn_fails_and_writes_nothing(caller: Any) -> None:
    version = caller.status().weight_version
    active_id = first(caller.start(epochs=100_000, coherence=LIVE), "step").run_id
    waiting = [caller.create(expected_weight_version=version + n) for n in (10**6,)]
    caller.cancel(active_id)
    caller.events_of(active_id)
    ended = [caller.events_of(run.run_id)[-1].finished for run in waiting]
    step = caller.status().optimizer_step
    assert [finished.failure.reason for finished in ended] == ["WEIGHT_VERSION_CHANGED"]
    assert ended[0].state == pb.RUN_STATE_FAILED
    assert ended[0].steps_done == 0
    assert step == caller.run(active_id).steps_done
    assert not caller.run(waiting[0].run_id).HasField("weight_version")


LIVE = pb.Coherence(mode=pb.COHERENCE_MODE_LIVE)
