"""What a run tells from its first event to its last, and that dry ones write nothing."""

from __future__ import annotations

import math

import grpc
from google.protobuf.duration_pb2 import Duration

from apollo_client.conformance.promises import Level, promise
from apollo_client.conformance.requirements import NotApplicableError, require, require_equal, shown
from apollo_client.conformance.server import (
    LONG_EPOCHS,
    Server,
    finished,
    sample,
    started,
    steps_of,
)
from apollo_grpc.v1 import training_pb2 as pb

ABORTED = grpc.StatusCode.ABORTED
AHEAD = 10**6
# Of a figure and the same in another way, in parts of it.
ROUNDING = 1e-4


@promise()
def train_streams_from_one_without_gaps(server: Server) -> None:
    """Every event of a run has a sequence number, from 1, without gaps."""
    events = server.ended
    numbers = [event.sequence for event in events]
    require_equal(numbers, list(range(1, len(numbers) + 1)), "sequences")
    require_equal(len({event.run_id for event in events}), 1, "ids of runs in one stream")


@promise()
def train_ends_with_finished(server: Server) -> None:
    """Train streams a run's events until it has ended: `finished` is the last, and one."""
    ends = [e.sequence for e in server.ended if e.HasField("finished")]
    require_equal(ends, [len(server.ended)], "sequences of `finished`")
    require_equal(finished(server.ended).state, pb.RUN_STATE_SUCCEEDED, "the state")


@promise()
def each_step_is_told_in_order(server: Server) -> None:
    """Steps are counted from 1 within the run, epochs from 0; `started` says how many come."""
    steps = steps_of(server.ended)
    require_equal(started(server.ended).steps_total, 4, "steps_total of 2 samples, 2 epochs")
    require_equal([step.step for step in steps], [1, 2, 3, 4], "steps")
    require_equal([step.epoch for step in steps], [0, 0, 1, 1], "epochs")
    indices = [list(step.sample_indices) for step in steps]
    require_equal(indices, [[0], [1], [0], [1]], "sample_indices")


@promise()
def losses_of_a_step_agree(server: Server) -> None:
    """`loss` is the mean of `loss_sum` over `tokens`, `sample_losses` those of its samples."""
    events = server.train(samples=[sample(1), sample(9)], samples_per_step=2)
    for step in [*steps_of(server.ended), *steps_of(events)]:
        told = shown(step)
        require(step.tokens > 0 and math.isfinite(step.loss), told)
        require_equal(len(step.sample_losses), len(step.sample_indices), "sample_losses")
        # Samples of one step are of one length here.
        mean = sum(step.sample_losses) / len(step.sample_indices)
        for same in (step.loss_sum / step.tokens, mean):
            require(math.isclose(step.loss, same, rel_tol=ROUNDING), told)


@promise()
def an_evaluation_tells_each_sample(server: Server) -> None:
    """With `evaluate`, `evaluated` has the loss of each sample before and after the run."""
    told = [e.evaluated for e in server.ended if e.HasField("evaluated")]
    require_equal([each.after_training for each in told], [False, True], "`evaluated` after")
    require_equal([len(each.losses) for each in told], [2, 2], "losses in each")


@promise()
def evaluation_samples_are_told_and_not_learned(server: Server) -> None:
    """`evaluation_samples` are told by their losses in `evaluated`, and never learned."""
    held = [sample(5), sample(6), sample(7)]
    events = server.train(evaluation_samples=held, evaluate_every_steps=1)
    told = [e.evaluated for e in events if e.HasField("evaluated")]
    require(told, "no `evaluated` event")
    require(all(len(each.evaluation_losses) == 3 for each in told), shown(told))
    require_equal(sum(s.tokens for s in steps_of(events)), 4, "tokens that were learned")


@promise()
def a_seed_shuffles_each_epoch(server: Server) -> None:
    """`seed` shuffles the samples of each epoch: each is learned once, and again in that order."""
    samples, orders = [sample(n) for n in range(1, 4)], []
    for epochs in (2, 1):
        steps = steps_of(server.train(samples=samples, epochs=epochs, seed=3))
        orders.append([index for step in steps for index in step.sample_indices])
    for epoch in (orders[0][:3], orders[0][3:]):
        require_equal(sorted(epoch), [0, 1, 2], "samples of an epoch, sorted")
    require_equal(orders[1], orders[0][:3], "the order of the same seed")


@promise()
def dry_runs_change_no_weight_version(server: Server) -> None:
    """`dry_run`: losses, gradients and updates are computed, and nothing is written."""
    began, ended = started(server.ended), finished(server.ended)
    require(began.dry_run and all(s.dry_run for s in steps_of(server.ended)), "no `dry_run`")
    require_equal(ended.weight_version, began.weight_version, "weight_version after the run")
    require_equal(ended.steps_done, 0, "steps in the weights")
    require(all(step.update_norm > 0 for step in steps_of(server.ended)), "updates of norm 0")


@promise()
def a_run_that_fails_ends_its_stream_well(server: Server) -> None:
    """A run that fails ends its stream with status OK and a `finished` that says FAILED and why."""
    events = server.train(epochs=LONG_EPOCHS, max_wall_time=Duration(nanos=1_000_000))
    ended = finished(events)
    require_equal(ended.state, pb.RUN_STATE_FAILED, "the state after `max_wall_time`")
    require_equal(ended.failure.reason, "DEADLINE", "the reason")
    require(ended.failure.message, "no message of the failure")


@promise()
def expected_versions_are_looked_at(server: Server) -> None:
    """A run for another `expected_weight_version` is refused (ABORTED), or fails at its turn."""
    version = server.status().weight_version
    events = server.train(expected_weight_version=version + AHEAD)
    ended = finished(events)
    require_equal(
        (ended.state, ended.failure.reason),
        (pb.RUN_STATE_FAILED, "WEIGHT_VERSION_CHANGED"),
        "a run for a version to come",
    )
    require(not steps_of(events), "steps of a run for a version to come")
    if version == 0:
        raise NotApplicableError("the weights have version 0, before which there is none")
    spec = server.spec(expected_weight_version=version - 1)
    request = pb.CreateRunRequest(spec=spec)
    server.refused(request, ABORTED, "WEIGHT_VERSION_CHANGED")


@promise(Level.WRITE)
def an_update_raises_the_weight_version_by_one(server: Server) -> None:
    """`weight_version` is raised by one with each update of the weights, and a run says it."""
    events = list(server.begin(server.update()))
    began, ended = started(events), finished(events)
    require_equal(ended.state, pb.RUN_STATE_SUCCEEDED, "the state")
    require_equal(ended.steps_done, 1, "steps in the weights")
    require_equal(ended.weight_version, began.weight_version + 1, "weight_version after a step")
    require(server.status().weight_version >= ended.weight_version, "an older version in GetStatus")
    run = server.run(events[0].run_id)
    require_equal(run.weight_version, ended.weight_version, "weight_version in GetRun")
    steps = [step.optimizer_step for step in steps_of(events)]
    require_equal(steps, [began.optimizer_step + 1], "optimizer_step of the step")


@promise(Level.WRITE)
def each_mode_of_coherence_trains(server: Server) -> None:
    """Each of the `coherence_modes` that GetServerInfo tells takes a run."""
    for mode in server.info.model.coherence_modes:
        events = list(server.begin(server.update(coherence=pb.Coherence(mode=mode))))
        name = pb.CoherenceMode.Name(mode)
        require_equal(finished(events).state, pb.RUN_STATE_SUCCEEDED, f"the state with {name}")
