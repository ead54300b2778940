"""The status, and the mark that whoever changes it leaves."""

from __future__ import annotations

from apollo_grpc.v1 import status_pb2, training_pb2
from apollo_trainer.engine.status_board import KEPT_EVENTS, StatusBoard


class Listener:
    """Counts how often it was called."""

    def __init__(self) -> None:
        self.events = self.changes = 0

    def event_came(self) -> None:
        self.events += 1

    def status_changed(self) -> None:
        self.changes += 1


def new_board() -> StatusBoard:
    return StatusBoard("1.2.3", "no engine yet")


def step(number: int) -> training_pb2.RunEvent:
    return training_pb2.RunEvent(run_id="r", sequence=number)


def test_a_new_board_is_detached_and_says_why() -> None:
    status = new_board().snapshot()
    assert status.attachment == status_pb2.ATTACHMENT_STATE_DETACHED
    assert status.attachment_detail == "no engine yet"
    assert status.server_version == "1.2.3"


def test_uptime_goes_on_by_itself() -> None:
    board = new_board()
    first = board.snapshot().uptime.ToNanoseconds()
    assert 0 <= first < board.snapshot().uptime.ToNanoseconds()


def test_a_snapshot_is_a_copy() -> None:
    board = new_board()
    board.snapshot().model = "changed"
    assert board.snapshot().model == ""


def test_a_change_is_taken_once() -> None:
    board = new_board()
    board.update(queue_length=3)
    board.update(queue_length=4)
    taken = board.take_status()
    assert taken and taken.queue_length == 4
    assert board.take_status() is None


def test_the_listener_gets_the_events_themselves_in_order() -> None:
    board, listener = new_board(), Listener()
    board.publish(step(1))
    board.listen(listener)
    events = [step(2), step(3)]
    for event in events:
        board.publish(event)
    board.update(queue_length=1)
    taken, missed = board.take_events()
    assert all(a is b for a, b in zip(taken, events, strict=True))
    assert (missed, listener.events, listener.changes) == (0, 2, 1)
    assert board.take_events() == ([], 0)


def test_events_that_nobody_takes_are_bounded_and_counted() -> None:
    board = new_board()
    board.listen(Listener())
    for number in range(KEPT_EVENTS + 7):
        board.publish(step(number))
    events, missed = board.take_events()
    assert (events[0].sequence, len(events), missed) == (7, KEPT_EVENTS, 7)


def test_where_nobody_listens_nothing_is_kept() -> None:
    board, listener = new_board(), Listener()
    board.listen(listener)
    board.publish(step(1))
    board.listen(None)
    board.publish(step(2))
    board.update(queue_length=1)
    assert board.take_events() == ([], 0)
    assert listener.changes == 0
