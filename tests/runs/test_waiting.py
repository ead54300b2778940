"""What waits costs no memory: runs are read again in their turn, snapshots copied in theirs."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest

from apollo_grpc.errors import Quota, ResourceExhausted, Unavailable
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore
from apollo_trainer.operations.checkpoint_jobs import CheckpointJobs
from apollo_trainer.training.samples import TokenizedSample
from tests.waiting import HANG

LONG = {"epochs": 100_000, "dry_run": True}


def sample(first: int, tokens: int = 4) -> pb.Sample:
    ids = [70 + i % 30 for i in range(tokens)]
    return pb.Sample(tokens=pb.TokenSample(context_ids=[first, 61], continuation_ids=ids))


def held_samples(first: int) -> int:
    """Samples in memory whose context begins so."""
    return sum(
        type(each) is TokenizedSample and each.context_ids[0] == first for each in gc.get_objects()
    )


def test_the_samples_of_a_run_that_waits_are_not_in_memory(attached: Any, all_events: Any) -> None:
    _, trainer = attached
    at_work = trainer.submit(samples=[sample(60)], **LONG)
    waiting = [trainer.submit(samples=[sample(99)] * 50, samples_per_step=50) for _ in range(4)]
    assert held_samples(99) == 0
    trainer.queue.cancel(at_work.run_id)
    for log in waiting:
        events = all_events(log)
        assert [e.step.tokens for e in events if e.HasField("step")] == [200]
        assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED


def test_a_run_that_waited_trains_what_was_sent(attached: Any, all_events: Any) -> None:
    _, trainer = attached
    asked = {"samples": [sample(60), sample(64, 9)], "epochs": 2, "dry_run": True, "seed": 5}
    alone = all_events(trainer.submit(**asked))
    at_work = trainer.submit(**LONG)
    waited = trainer.submit(**asked)
    trainer.queue.cancel(at_work.run_id)
    losses = [
        [e.step.loss for e in events if e.HasField("step")]
        for events in (alone, all_events(waited))
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_the_bytes_of_what_waits_are_bounded(
    start_engine: Any, start_trainer: Any, all_events: Any
) -> None:
    start_engine()
    trainer = start_trainer(max_queued_mebibytes=1, max_samples=100_000)
    trainer.wait_for(status_pb2.ATTACHMENT_STATE_ATTACHED)
    large = [sample(60, 40)] * 15_000
    assert 2**19 < pb.RunSpec(samples=large).ByteSize() < 2**20
    at_work = trainer.submit(**LONG)
    # The one at work does not count.
    first = trainer.submit(samples=large, samples_per_step=4096, dry_run=True)
    with pytest.raises(ResourceExhausted) as refused:
        trainer.submit(samples=large)
    assert refused.value.reason == "QUEUE_FULL"
    assert refused.value.metadata == {"limit_mebibytes": "1"}
    assert refused.value.quota == Quota("queued_bytes", f"at most {2**20}")
    trainer.submit(dry_run=True)
    trainer.queue.cancel(first.run_id)
    last = trainer.submit(samples=large, dry_run=True)
    for log in (last, at_work):
        trainer.queue.cancel(log.run_id)


def test_a_snapshot_that_waits_is_refused_when_the_server_stops(
    attached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trainer = attached
    create, begun = SnapshotStore.create, threading.Event()

    def slowly(store: SnapshotStore, *arguments: Any) -> Any:
        begun.set()
        assert trainer.owner.stopping.wait(HANG)
        return create(store, *arguments)

    monkeypatch.setattr(SnapshotStore, "create", slowly)
    jobs = CheckpointJobs(trainer.owner, trainer.board)
    first, waiting = (jobs.snapshot(name, lambda *_: None) for name in ("first", "waiting"))
    assert begun.wait(HANG)
    trainer.owner.between_runs(lambda: None).result(HANG)
    trainer.stop()
    assert first.result(HANG).name == "first"
    with pytest.raises(Unavailable) as refused:
        waiting.result(HANG)
    assert refused.value.reason == "SERVER_STOPPING"
