"""What is kept of a model to go back to."""

from __future__ import annotations

from typing import Any

import pytest

from apollo_grpc.errors import OutOfRange
from apollo_grpc.v1 import status_pb2
from apollo_trainer.operations.checkpoint_jobs import CheckpointJobs
from tests.waiting import HANG


def test_where_no_updates_are_kept_an_undo_says_why_and_what_else_there_is(
    start_engine: Any, start_trainer: Any
) -> None:
    engine = start_engine()
    trainer = start_trainer(undo_mebibytes=0)
    trainer.wait_for(status_pb2.ATTACHMENT_STATE_ATTACHED)
    before = engine.model.values()
    with pytest.raises(OutOfRange, match=r"take 1 MiB, and undo_mebibytes is 0.*snapshot") as told:
        CheckpointJobs(trainer.owner, trainer.board).undo(1, None).result(HANG)
    assert told.value.reason == "UNDO_OFF"
    assert all((before[name] == value).all() for name, value in engine.model.values().items())
