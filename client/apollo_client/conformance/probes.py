"""Probes of runs, what they decide, and the regression set."""

from __future__ import annotations

import grpc

from apollo_client.conformance.promises import Level, promise
from apollo_client.conformance.requirements import NotApplicableError, require, require_equal
from apollo_client.conformance.server import Server, finished, sample, started
from apollo_grpc.v1 import training_pb2 as pb

PROBES = [
    pb.Probe(name="likely", sample=sample(1), check=pb.PROBE_CHECK_LOG_PROBABILITY),
    pb.Probe(sample=sample(2), check=pb.PROBE_CHECK_EXACT, role=pb.PROBE_ROLE_KEEP),
]
# A log-probability of 0 is a certainty.
NEVER = pb.Probe(
    name="never",
    sample=sample(1),
    check=pb.PROBE_CHECK_LOG_PROBABILITY,
    min_log_probability=0,
)


@promise()
def probes_of_a_dry_run_are_asked_before(server: Server) -> None:
    """A dry run changes no answer: its probes are asked before the first step alone."""
    told = _probed(server.train(probes=PROBES))
    require_equal([each.after_training for each in told], [False], "`probed` after")


@promise(Level.WRITE)
def probes_are_asked_before_and_after(server: Server) -> None:
    """Probes are asked before the first step and after the last; `probed` tells each result."""
    told = _probed(list(server.begin(server.update(probes=PROBES))))
    require_equal([each.after_training for each in told], [False, True], "`probed` after")


def _probed(events: list[pb.RunEvent]) -> list[pb.RunEvent.Probed]:
    """What `probed` events tell, which must be of these probes."""
    told = [event.probed for event in events if event.HasField("probed")]
    for each in told:
        found = [(r.name, r.role, r.regression) for r in each.results]
        expected = [
            ("likely", pb.PROBE_ROLE_LEARN, False),
            ("1", pb.PROBE_ROLE_KEEP, False),
        ]
        require_equal(found, expected, "names, roles and regression of the results")
        likely = each.results[0]
        require(likely.HasField("log_probability"), "no log_probability where it is asked")
        passes = likely.log_probability >= -1
        require_equal(likely.passed, passes, f"passed at {likely.log_probability} of least -1")
    return told


@promise()
def the_regression_set_is_listed_in_order(server: Server) -> None:
    """ListRegressionProbes lists probes in the order of their names; its pages join."""
    names, token = list[str](), ""
    while True:
        page = server.ask(pb.ListRegressionProbesRequest(page_size=2, page_token=token))
        require(len(page.probes) <= 2, f"{len(page.probes)} probes in a page of 2")
        names += [probe.name for probe in page.probes]
        if not (token := page.next_page_token):
            break
    require_equal(names, sorted(set(names)), "names")
    whole = server.ask(pb.ListRegressionProbesRequest(page_size=1000)).probes
    require_equal([probe.name for probe in whole], names[:1000], "names in one page")
    request = pb.ListRegressionProbesRequest(page_size=-1)
    server.refused(request, grpc.StatusCode.INVALID_ARGUMENT, fields=["page_size"])


@promise(Level.WRITE)
def deleting_unknown_probes_deletes_none(server: Server) -> None:
    """DeleteRegressionProbes is idempotent: names that are not there are left out."""
    request = pb.DeleteRegressionProbesRequest(names=[server.name()])
    require_equal(server.ask(request).deleted, 0, "deleted")


@promise(Level.WRITE)
def a_run_that_is_not_accepted_is_taken_back(server: Server) -> None:
    """Unless `accept_if` is met, a run ends as REJECTED; the version counts one more update."""
    accept = pb.AcceptIf(max_failed=0, max_lost=0, forget_probes=True)
    events = list(server.begin(server.update(probes=[NEVER], accept_if=accept)))
    began, ended = started(events), finished(events)
    if ended.failure.reason in ("NO_WAY_BACK", "PROBES_NOT_ASKED"):
        raise NotApplicableError(ended.failure.message)
    require_equal(ended.state, pb.RUN_STATE_REJECTED, "the state")
    require_equal(ended.failure.reason, "PROBES_FAILED", "the reason")
    require_equal(ended.steps_done, 0, "steps in the weights")
    require_equal(ended.weight_version, began.weight_version + 2, "weight_version")
