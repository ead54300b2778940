"""What promises come to on a server, and how that is told."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import Any

import grpc

from apollo_client.conformance.promises import Promise
from apollo_client.conformance.requirements import (
    BrokenPromiseError,
    NotApplicableError,
    shown,
)
from apollo_client.conformance.server import Server
from apollo_grpc.errors import PermissionDenied
from apollo_grpc.statuses import from_rpc_error

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not applicable"


@dataclass(frozen=True)
class Verdict:
    """What one promise came to.

    Attributes:
        seen: what was seen where it failed, or why it is not applicable.
    """

    name: str
    subject: str
    promise: str
    verdict: str
    seen: str
    seconds: float


def judge(server: Server, each: Promise) -> Verdict:
    """Tries one promise. Nothing that the server answers raises."""
    began, word, seen = monotonic(), PASSED, ""
    try:
        each.tried_on(server)
    except NotApplicableError as error:
        word, seen = NOT_APPLICABLE, str(error)
    except BrokenPromiseError as error:
        word, seen = FAILED, str(error)
    except grpc.RpcError as error:
        word, seen = _of_call(error)
    except StopIteration:
        word, seen = FAILED, "a stream ended before its first message"
    except Exception as error:
        # Answers of a shape that no check thought of are found here, one and not the last.
        word, seen = FAILED, f"{type(error).__name__}: {error}"
    took = round(monotonic() - began, 3)
    return Verdict(each.name, each.subject, each.words, word, shown(seen) if seen else "", took)


def _of_call(error: Any) -> tuple[str, str]:
    """Of a call that should have gone well: the token may not make it, or a limit is reached."""
    known = from_rpc_error(error)
    told = f"a call ended with {known.code.name}, {known.reason}: {known.message}"
    limited = known.quota is not None or known.retry_seconds > 0
    return (NOT_APPLICABLE if limited or isinstance(known, PermissionDenied) else FAILED), told


def line_of(verdict: Verdict) -> str:
    """For people: the promise, and in a second line what was seen."""
    line = f"{verdict.verdict:14} {verdict.subject}/{verdict.name}: {verdict.promise}"
    return f"{line}\n{'':14} {verdict.seen}" if verdict.seen else line
