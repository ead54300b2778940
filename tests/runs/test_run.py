"""What a spec becomes: batches in order, and refusals of what is wrong or not built."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.requests.samples import SampleLimits
from apollo_trainer.runs.run import PreparedRun, prepare_run

LIMITS = SampleLimits(vocabulary=100, max_tokens=20, max_samples=50)


def spec(count: int = 5, **fields: Any) -> pb.RunSpec:
    """Samples whose only continuation token is their number."""
    tokens = [pb.TokenSample(context_ids=[1], continuation_ids=[n]) for n in range(count)]
    return pb.RunSpec(samples=[pb.Sample(tokens=t) for t in tokens], **fields)


def prepared(count: int = 5, **fields: Any) -> PreparedRun:
    return prepare_run(spec(count, **fields), LIMITS, None)


def numbers(run: PreparedRun) -> list[list[int]]:
    return [
        [s.continuation_ids[0] for s in batch.samples] for batch in run.batches(run.anchor_turns())
    ]


def test_by_default_each_sample_is_one_step_in_order() -> None:
    run = prepared()
    assert numbers(run) == [[0], [1], [2], [3], [4]]
    assert run.steps_total == 5


def test_batches_keep_the_order_and_the_last_may_be_short() -> None:
    run = prepared(samples_per_step=2, epochs=2)
    assert numbers(run) == [[0, 1], [2, 3], [4]] * 2
    assert run.steps_total == 6


@pytest.mark.parametrize("count", [1, 2, 5, 7])
@pytest.mark.parametrize("samples_per_step", [1, 2, 3, 50])
@pytest.mark.parametrize("epochs", [1, 3])
def test_steps_total_is_the_number_of_batches(
    count: int, samples_per_step: int, epochs: int
) -> None:
    run = prepared(count, samples_per_step=samples_per_step, epochs=epochs, seed=1)
    assert run.steps_total == len(list(run.batches(run.anchor_turns())))


def test_a_seed_shuffles_each_epoch_anew_and_the_same_way_every_time() -> None:
    run = prepared(20, epochs=2, samples_per_step=20, seed=7)
    first, second = numbers(run)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first != list(range(20))
    assert numbers(prepared(20, epochs=2, samples_per_step=20, seed=7)) == [first, second]
    assert numbers(prepared(20, epochs=2, samples_per_step=20, seed=8)) != [first, second]


def test_seed_zero_is_a_seed() -> None:
    assert prepared(seed=0).seed == 0
    assert prepared().seed is None
    assert numbers(prepared(20, samples_per_step=20, seed=0)) != [list(range(20))]


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", -1), ("epochs", 100_001), ("samples_per_step", -1), ("samples_per_step", 4097)],
)
def test_counts_out_of_range_are_refused_at_their_field(name: str, value: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        prepared(**{name: value})
    assert [v.field for v in caught.value.violations] == [f"spec.{name}"]


@pytest.mark.parametrize("name", ["mode", "cache_policy"])
def test_a_coherence_of_a_later_version_is_refused_at_its_field(name: str) -> None:
    wrong = pb.Coherence()
    wrong.MergeFromString(bytes([{"mode": 8, "cache_policy": 16}[name], 99]))
    with pytest.raises(InvalidArgument, match=f"spec.coherence.{name}: is 99") as caught:
        prepared(coherence=wrong)
    assert [v.field for v in caught.value.violations] == [f"spec.coherence.{name}"]


def test_limits_that_are_none_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(InvalidArgument, match=r"spec\.guard\.max_loss"):
        prepared(guard=pb.Guard(max_loss=-1.0))


def test_what_a_spec_asks_of_its_steps_is_kept() -> None:
    asked = pb.Coherence(mode=pb.COHERENCE_MODE_LIVE, cache_policy=pb.CACHE_POLICY_KEEP)
    run = prepared(dry_run=True, evaluate=True, guard=pb.Guard(max_loss=2.0), coherence=asked)
    assert (run.dry_run, run.evaluate, run.guard.max_loss) == (True, True, 2.0)
    assert run.coherence == asked
    plain = prepared()
    assert (plain.dry_run, plain.evaluate, plain.guard.max_loss) == (False, False, None)


@pytest.mark.parametrize(
    "wrong",
    [
        Duration(),
        Duration(seconds=-1),
        Duration(seconds=1, nanos=-1),
        Duration(nanos=2**31 - 1),
        Duration(seconds=2**63 - 1),
    ],
)
def test_a_wall_time_that_is_none_is_refused_at_its_field(wrong: Duration) -> None:
    with pytest.raises(InvalidArgument) as caught:
        prepared(max_wall_time=wrong)
    assert [v.field for v in caught.value.violations] == ["spec.max_wall_time"]


def test_a_wall_time_is_kept_in_seconds() -> None:
    assert prepared(max_wall_time=Duration(seconds=1, nanos=500_000_000)).max_seconds == 1.5
    assert prepared().max_seconds is None


def test_the_defaults_may_be_spelled_out() -> None:
    coherence = pb.Coherence(
        mode=pb.COHERENCE_MODE_PAUSE_RUN, cache_policy=pb.CACHE_POLICY_RESET_AT_END
    )
    prepared(coherence=coherence, guard=pb.Guard(), epochs=1, samples_per_step=1)


def test_wrong_options_and_wrong_samples_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"spec\.optimizer\.lr"):
        prepared(optimizer=pb.OptimizerConfig(lr=-1))
    with pytest.raises(InvalidArgument, match=r"spec\.samples"):
        prepared(0)
