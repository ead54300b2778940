"""What is asked about samples without a run: whether they are valid, their tokens, their scores."""

from __future__ import annotations

import math

import grpc

from apollo_client.conformance.promises import promise
from apollo_client.conformance.refusals import refusal_of
from apollo_client.conformance.requirements import BrokenPromiseError, require, require_equal
from apollo_client.conformance.server import Server, finished, sample, started, steps_of
from apollo_grpc.v1 import training_pb2 as pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT
TEXT = pb.Sample(text=pb.TextSample(context="One and one is", continuation=" two."))
SAMPLES = [sample(1), sample(2, 1), sample(3, 7)]
MOST = 1024
# Of a sum of log-probabilities, in nats.
ROUNDING = 1e-3


@promise()
def a_valid_run_comes_to_what_it_is_told(server: Server) -> None:
    """ValidateRun says what a spec comes to: the steps and tokens that Train then has."""
    spec = server.spec(samples=SAMPLES, samples_per_step=2, epochs=1)
    found = server.ask(pb.ValidateRunRequest(spec=spec))
    events = list(server.begin(spec))
    require_equal(found.steps_total, started(events).steps_total, "steps_total")
    tokens = sum(step.tokens for step in steps_of(events))
    require_equal(found.continuation_tokens, tokens, "continuation_tokens")
    require_equal(found.context_tokens, 9, "context_tokens of three contexts of 3 tokens")
    require_equal(found.longest_sample_tokens, 10, "longest_sample_tokens")


@promise()
def what_train_refuses_is_invalid(server: Server) -> None:
    """ValidateRun's errors are those that Train would answer at this moment."""
    for spec in (
        server.spec(samples=[pb.Sample(), sample(1)]),
        server.spec(optimizer=pb.OptimizerConfig(lr=-1, beta1=2)),
        server.spec(samples_per_step=-1, epochs=-1),
    ):
        told = server.refused(pb.ValidateRunRequest(spec=spec), INVALID)
        trained = server.refused(pb.TrainRequest(spec=spec), INVALID)
        require_equal(told, trained, "ValidateRun's error, and Train's")


@promise()
def nothing_begins_where_a_run_is_validated(server: Server) -> None:
    """ValidateRun begins nothing."""
    name = server.name()
    server.ask(pb.ValidateRunRequest(spec=server.spec(name=name)))
    runs = server.ask(pb.ListRunsRequest(name=name)).runs
    require_equal([run.run_id for run in runs], [], "runs of the name that was validated")


@promise()
def tokens_are_counted_in_order(server: Server) -> None:
    """CountTokens makes samples into tokens as Train does, and counts these in their order."""
    found = server.ask(pb.CountTokensRequest(samples=[*SAMPLES, TEXT])).counts
    counts = [(each.context_tokens, each.continuation_tokens) for each in found]
    require_equal(counts[:3], [(3, 4), (3, 1), (3, 7)], "counts of token samples")
    events = server.train(samples=[TEXT])
    require_equal(finished(events).state, pb.RUN_STATE_SUCCEEDED, "a run of a text")
    (step,) = steps_of(events)
    require_equal(len(counts), 4, "counts of four samples")
    require_equal(counts[3][1], step.tokens, "continuation tokens of a text")


@promise()
def each_token_is_scored(server: Server) -> None:
    """ScoreSamples tells the log-probability of each continuation token, and their sum."""
    answer = server.ask(pb.ScoreSamplesRequest(samples=[*SAMPLES, TEXT]))
    counted = server.ask(pb.CountTokensRequest(samples=[*SAMPLES, TEXT])).counts
    lengths = [len(score.log_probabilities) for score in answer.scores]
    require_equal(lengths, [each.continuation_tokens for each in counted], "scores of each")
    for score in answer.scores:
        found = list(score.log_probabilities)
        require(all(x <= ROUNDING for x in found), f"log-probabilities above 0: {found}")
        near = math.isclose(sum(found), score.log_probability, abs_tol=ROUNDING)
        require(near, f"the sum of {found} is told as {score.log_probability}")
    require(answer.weight_version_before <= answer.weight_version_after, "versions that fall")


@promise()
def asked_samples_are_named_where_they_are_wrong(server: Server) -> None:
    """INVALID_ARGUMENT: a sample is wrong, by its path, of CountTokens and ScoreSamples."""
    outside = pb.TokenSample(context_ids=[1], continuation_ids=[server.info.model.vocabulary])
    samples = [sample(1), pb.Sample(tokens=outside)]
    fields = ["samples[1].tokens.continuation_ids[0]"]
    for kind in (pb.CountTokensRequest, pb.ScoreSamplesRequest):
        server.refused(kind(samples=samples), INVALID, fields=fields)


@promise()
def too_many_samples_are_not_scored(server: Server) -> None:
    """ScoreSamples is INVALID_ARGUMENT where samples are more than 1024."""
    request = pb.ScoreSamplesRequest(samples=[sample(1)] * (MOST + 1))
    try:
        answers = list(server.stream(request))
    except grpc.RpcError as error:
        found = refusal_of(error, f"ScoreSamples of {MOST + 1}")
        require_equal((found.code, found.fields), (INVALID, ["samples"]), "how it is refused")
    else:
        raise BrokenPromiseError(f"it was answered with {len(answers[0].scores)} scores")
