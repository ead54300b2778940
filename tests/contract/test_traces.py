"""Spans without OpenTelemetry, and without an SDK."""

from __future__ import annotations

import importlib.util
import sys
from contextvars import copy_context
from types import ModuleType
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from apollo_grpc import traces


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module as it is where the API is not installed."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    spec = importlib.util.spec_from_file_location("traces_without", traces.__file__)
    assert spec and spec.loader
    module: ModuleType = importlib.util.module_from_spec(spec)
    # Where dataclasses look for it.
    monkeypatch.setitem(sys.modules, "traces_without", module)
    spec.loader.exec_module(module)
    return module


def test_where_the_api_is_not_installed_nothing_happens(without: Any) -> None:
    assert without.outgoing() == ()
    without.adopt([("traceparent", f"00-{1:032x}-{2:016x}-01")])
    begun = without.begin("run", steps=3)
    with begun.current(), without.span("pause") as within:
        within.end(failed=True)
    begun.end(state="x")


def test_without_a_span_a_call_carries_nothing() -> None:
    assert traces.outgoing() == ()


def carried_after(*metadata: tuple[str, str]) -> dict[str, str]:
    """What a call carries where one with that metadata has come, and a span has begun in it."""

    def within() -> dict[str, str]:
        traces.adopt(metadata)
        with traces.begin("run").current():
            return dict(traces.outgoing())

    return copy_context().run(within)


def test_what_comes_with_a_call_goes_out_with_those_that_it_makes() -> None:
    parent = f"00-{1:032x}-{2:016x}-01"
    carried = carried_after(("traceparent", parent), ("authorization", "Bearer x"))
    assert carried == {"traceparent": parent}


@pytest.mark.parametrize(
    "sent", ["", "00-xx-yy-01", "00-" + "f" * 9999, f"00-{0:032x}-{0:016x}-01"]
)
def test_what_is_no_trace_parent_is_none(sent: str) -> None:
    assert carried_after(("traceparent", sent)) == {}


def test_a_span_that_raises_has_failed_without_the_errors_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provider, kept = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    with pytest.raises(ValueError, match="a sample"), traces.span("sync", kind="x"):
        raise ValueError("a sample")
    (ended,) = kept.get_finished_spans()
    assert (ended.name, dict(ended.attributes or {})) == ("sync", {"apollo.kind": "x"})
    assert not ended.status.is_ok and not ended.status.description and not ended.events
