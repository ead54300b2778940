"""Events of one run and of all, read again from any place, and by many."""

from __future__ import annotations

from functools import cache

from apollo_client.conformance.promises import promise
from apollo_client.conformance.requirements import BrokenPromiseError, require, require_equal
from apollo_client.conformance.server import Server, finished
from apollo_grpc.v1 import training_pb2 as pb


@promise()
def the_rest_of_a_run_is_told_exactly(server: Server) -> None:
    """WatchRun streams the events after any sequence, lossless and gapless; 0 means all."""
    events = server.ended
    for after in range(len(events)):
        told = server.events(events[0].run_id, after)
        if told != events[after:]:
            numbers = [event.sequence for event in told]
            raise BrokenPromiseError(f"after {after} of {len(events)}: sequences {numbers}")


@promise()
def a_run_at_work_is_watched_to_its_end(server: Server) -> None:
    """WatchRun streams the events of a run while it runs, the same to each caller."""
    with server.long() as run_id:
        call = server.stream(pb.WatchRunRequest(run_id=run_id))
        told = [next(call).event]
        server.ask(pb.CancelRunRequest(run_id=run_id))
        told += [answer.event for answer in call]
    require(told == server.events(run_id), "other events than a second reader is told")
    numbers = [event.sequence for event in told]
    require_equal(numbers, list(range(1, len(told) + 1)), "sequences")
    finished(told)


@promise(trains=False)
def watching_all_from_now_on_says_where(server: Server) -> None:
    """WatchRuns without a revision begins with that of now, and has no event of before."""
    call = server.stream(pb.WatchRunsRequest())
    first = next(call)
    call.cancel()
    # An event, where another caller's run tells one at that moment.
    require(first.revision > 0 or not first.HasField("event"), "an event without a revision")


@promise()
def all_runs_events_are_told_in_order(server: Server) -> None:
    """WatchRuns streams the events of all runs, lossless and gapless; revisions rise with each."""
    told, trained = _told_of_all(server)
    revisions = [answer.revision for answer in told]
    require(revisions == sorted(set(revisions)), f"revisions {revisions}")
    for run in trained:
        mine = [a.event for a in told if a.event.run_id == run[0].run_id]
        if mine != run:
            numbers = [event.sequence for event in mine]
            raise BrokenPromiseError(f"of a run of {len(run)} events, sequences {numbers}")


@promise()
def the_rest_of_all_runs_is_told_exactly(server: Server) -> None:
    """WatchRuns streams what came after any revision, lossless and gapless."""
    told, trained = _told_of_all(server)
    ids = {run[0].run_id for run in trained}
    mine = [answer for answer in told if answer.event.run_id in ids]
    for place in (0, len(mine) // 2, len(mine) - 2):
        again = _until(server, mine[place].revision, trained[-1])
        rest = [answer for answer in again if answer.event.run_id in ids]
        if rest != mine[place + 1 :]:
            numbers = [a.revision for a in rest]
            expected = [a.revision for a in mine[place + 1 :]]
            raise BrokenPromiseError(f"revisions {numbers} in place of {expected}")


@promise()
def all_that_is_kept_is_told(server: Server) -> None:
    """WatchRuns after revision 0 begins with the oldest event that is kept."""
    require(server.ended, "no run")
    call = server.stream(pb.WatchRunsRequest(after_revision=0))
    first = next(call)
    call.cancel()
    require(first.HasField("event"), "the first message has no event")


@promise()
def deleted_runs_are_left_out(server: Server) -> None:
    """WatchRuns leaves out what DeleteRun deleted."""
    call = server.stream(pb.WatchRunsRequest())
    start = next(call).revision
    call.cancel()
    gone = server.train()
    server.ask(pb.DeleteRunRequest(run_id=gone[0].run_id))
    told = _until(server, start, server.train())
    require(gone[0].run_id not in {a.event.run_id for a in told}, "events of the deleted run")


@cache
def _told_of_all(
    server: Server,
) -> tuple[list[pb.WatchRunsResponse], list[list[pb.RunEvent]]]:
    """What a watcher of all runs is told of two, and these."""
    call = server.stream(pb.WatchRunsRequest())
    start = next(call).revision
    call.cancel()
    trained = [server.train(epochs=2), server.train()]
    return _until(server, start, trained[-1]), trained


def _until(server: Server, revision: int, run: list[pb.RunEvent]) -> list[pb.WatchRunsResponse]:
    """What WatchRuns tells after a revision, to the end of a run."""
    told: list[pb.WatchRunsResponse] = []
    call = server.stream(pb.WatchRunsRequest(after_revision=revision))
    try:
        for answer in call:
            told.append(answer)
            if answer.event.run_id == run[0].run_id and answer.event.HasField("finished"):
                return told
    finally:
        call.cancel()
    raise BrokenPromiseError("WatchRuns ended by itself")
