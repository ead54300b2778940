"""A receiver of traces over OTLP: opentelemetry-proto's own service, which keeps what it is sent.

No collector is to be had from PyPI; what exports to this one is OpenTelemetry's own SDK.
"""

from __future__ import annotations

import threading
from concurrent import futures
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from tests.waiting import HANG

CLIENTS_SERVICE = "the client"


class Receiver(TraceServiceServicer):
    """Takes spans on a port of 127.0.0.1 until `stop`."""

    def __init__(self) -> None:
        self._came, self.requests = threading.Condition(), list[Any]()
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> pb.ExportTraceServiceResponse:
        with self._came:
            self.requests.append(request)
            self._came.notify_all()
        return pb.ExportTraceServiceResponse()

    def spans(self) -> list[Any]:
        """Those that have come."""
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def wait_for(self, name: str, count: int) -> list[Any]:
        """So many spans of a name, once they have come."""

        def named() -> list[Any]:
            return [span for span in self.spans() if span.name == name]

        with self._came:
            assert self._came.wait_for(lambda: len(named()) >= count, HANG), (name, self.spans())
            return named()

    def environment(self) -> dict[str, str]:
        """By which an SDK in another process sends to this, as OpenTelemetry specifies them."""
        return {
            "OTEL_SERVICE_NAME": "apollo-training-server",
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }

    def stop(self) -> None:
        self._server.stop(grace=None).wait()


def instrument() -> None:
    """In the server's process: what `opentelemetry-instrument` does before the program begins."""
    from opentelemetry.instrumentation.auto_instrumentation import initialize

    initialize()
