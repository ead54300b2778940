"""What the command prints of events."""

from __future__ import annotations

from apollo_client.command.display import event_line
from apollo_client.requests import run_spec
from apollo_grpc.v1 import training_pb2 as pb

MESSAGE = "All samples are learned."


def test_a_run_that_ended_early_says_why_in_its_last_line() -> None:
    finished = pb.Finished(state=pb.RUN_STATE_SUCCEEDED, steps_done=9, weight_version=9)
    assert event_line(pb.RunEvent(finished=finished)).endswith("vLLM paused for 0.00 s")
    finished.stopped.CopyFrom(pb.Stopped(reason="GUARD_MIN_LOSS", message=MESSAGE))
    line = event_line(pb.RunEvent(finished=finished))
    assert line.startswith("succeeded: 9 steps") and line.endswith(MESSAGE)
    assert "\n" not in line


def test_a_smallest_loss_of_0_is_told_to_the_server() -> None:
    assert run_spec([("a", "b")], {"min_loss": 0}).guard.HasField("min_loss")
    assert not run_spec([("a", "b")], {}).guard.HasField("min_loss")
