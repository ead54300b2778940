"""Spans of OpenTelemetry, by its API alone: without it, or without an SDK, nothing happens.

Spans have no text of an error and nothing of a sample. Any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

try:
    from opentelemetry import context, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    _installed = False
else:
    _installed = True

NAME = "apollo_grpc"
KEYS = ("traceparent", "tracestate")
Value = str | int | float | bool
# An OpenTelemetry context; None where there is none.
Place = Any


@dataclass
class Span:
    """What has a beginning and an end; `end` may be called on any thread, and again."""

    _span: Any = None

    def end(self, *, failed: bool = False, **attributes: Value) -> None:
        """Ends it, with what it came to."""
        span, self._span = self._span, None
        if span is None:
            return
        span.set_attributes(_named(attributes))
        if failed:
            span.set_status(trace.StatusCode.ERROR)
        span.end()

    @contextmanager
    def current(self) -> Iterator[None]:
        """What begins within the block, on this thread, is within this one."""
        if self._span is None:
            yield
            return
        with trace.use_span(self._span, record_exception=False, set_status_on_exception=False):
            yield


def here() -> Place:
    """Where this thread or task is, for `begin` on another one."""
    return context.get_current() if _installed else None


def begin(name: str, place: Place = None, **attributes: Value) -> Span:
    """Begins a span within the one at `place`; by default, within that of this thread or task."""
    if not _installed:
        return Span()
    tracer = trace.get_tracer(NAME)
    return Span(tracer.start_span(name, place, attributes=_named(attributes)))


@contextmanager
def span(name: str, place: Place = None, **attributes: Value) -> Iterator[Span]:
    """A span around the block, which has failed where that raises."""
    begun = begin(name, place, **attributes)
    try:
        with begun.current():
            yield begun
    except BaseException:
        begun.end(failed=True)
        raise
    begun.end()


def outgoing() -> tuple[tuple[str, str], ...]:
    """Metadata of a call that is made here: none where no span is current."""
    carrier = dict[str, str]()
    if _installed:
        TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())


def adopt(metadata: Iterable[tuple[str, Any]]) -> None:
    """Has what begins in this task from now on be within the span that a caller's metadata name."""
    if _installed and (sent := {key: str(value) for key, value in metadata if key in KEYS}):
        context.attach(TraceContextTextMapPropagator().extract(sent))


def _named(attributes: dict[str, Value]) -> dict[str, Value]:
    return {f"apollo.{name}": value for name, value in attributes.items()}
