"""What both clients ask about samples and about the server."""

from __future__ import annotations

import pytest

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from tests.client.scripted_server import Scripted, serving
from tests.waiting import wait_until

SAMPLE = {"context": "The sea is", "continuation": " deep.", "weight": 2}
TALK = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 1},
        {"role": "assistant", "content": "c"},
    ]
}
WRONG = {"context_ids": [1], "continuation_ids": [5, 999]}


def test_scores_come_in_the_order_of_the_samples(connect, server):
    client = connect(server)
    # Of another test: scores of two versions would differ.
    wait_until(lambda: not client.call("status").active_run_id, "the end of the run")
    found = client.call("score", iter([SAMPLE, TALK, ("a", "b")]))
    # A chat of two answers is two samples.
    assert len(found.scores) == 4
    assert all(each.log_probability < 0 for each in found.scores)
    assert found.scores[0] == client.call("score", [("The sea is", " deep.")]).scores[0]
    assert found.weight_version_after == client.call("status").weight_version


def test_tokens_are_counted_as_a_run_makes_them(connect, server):
    counts = connect(server).call("count_tokens", [SAMPLE, ("a", "b")])
    assert [(each.context_tokens, each.continuation_tokens) for each in counts] == [(10, 6), (1, 1)]


def test_a_run_is_checked_with_its_options_and_does_not_begin(connect, server):
    client = connect(server)
    before = client.call("list_runs", 1).runs
    found = client.call("validate", [SAMPLE] * 3, epochs=5, samples_per_step=2, lr=1e-4)
    assert (found.steps_total, found.longest_sample_tokens) == (10, 16)
    with pytest.raises(InvalidArgument) as caught:
        client.call("validate", [SAMPLE], lr=-1)
    assert [v.field for v in caught.value.violations] == ["spec.optimizer.lr"]
    assert client.call("list_runs", 1).runs == before


@pytest.mark.parametrize("name", ["score", "count_tokens", "validate"])
def test_a_refusal_names_the_callers_own_item(connect, server, name):
    with pytest.raises(InvalidArgument) as caught:
        connect(server).call(name, [TALK, WRONG])
    (violation,) = caught.value.violations
    # Of a run the path is that of the request.
    assert violation.field.removeprefix("spec.") == "samples[1].tokens.continuation_ids[1]"
    assert violation.field in caught.value.message


def test_what_is_no_sample_is_refused_before_it_is_sent(connect, server):
    with pytest.raises(InvalidArgument, match=r"samples\[1\]"):
        connect(server).call("score", [SAMPLE, 5])


def test_a_refusal_of_too_many_says_where_to_cut(connect, server):
    with pytest.raises(InvalidArgument, match=r"at most 1024; up to samples\[1023\] they fit"):
        connect(server).call("score", [SAMPLE] * 1025)


def test_a_score_may_take_longer_than_other_answers(connect):
    left = []

    class Slow(Scripted):
        def ScoreSamples(self, request, context):
            left.append(context.time_remaining())
            return pb.ScoreSamplesResponse()

    with serving(Slow()) as address:
        connect(address).call("score", [SAMPLE])
    # grpc's number for no deadline.
    assert left[0] > 1e9


def test_the_server_tells_what_it_takes(connect, server):
    info = connect(server).call("server_info")
    assert info.limits.samples == 10_000
    assert info.model.vocabulary == 259
