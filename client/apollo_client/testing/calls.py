"""The wire of a fake server: the method of each call, and errors as the contract has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from apollo_grpc.errors import ApolloError, InvalidArgument
from apollo_grpc.statuses import abort_arguments
from apollo_grpc.v1 import checkpoint_pb2, dataset_pb2, status_pb2, training_pb2

METHODS = {
    f"/{service.full_name}/{method.name}": method
    for file in (checkpoint_pb2, dataset_pb2, status_pb2, training_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


HEALTH, SERVING = "/grpc.health.v1.Health/Check", b"\x08\x01"


class Calls(grpc.GenericRpcHandler):
    """Has each method done by one of these: `Train` by `train`.

    Args:
        woken: called when a caller leaves.
    """

    def __init__(self, services: list[Any], woken: Callable[[], None]):
        self._services, self._woken = services, woken

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """As grpc asks; None for a method that is none, which it refuses."""
        if handler_call_details.method == HEALTH:
            return grpc.unary_unary_rpc_method_handler(lambda request, context: SERVING)
        method: Any = METHODS.get(handler_call_details.method)
        if method is None:
            return None
        # Whatever a method takes and gives, on the wire it is this.
        return grpc.stream_stream_rpc_method_handler(partial(self._answer, method))

    def _answer(self, method: Any, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        context.add_callback(self._woken)
        try:
            for answer in self._answers(method, _read(method, messages), context):
                yield answer.SerializeToString()
        except ApolloError as error:
            code, words, details = abort_arguments(error)
            context.set_trailing_metadata(details)
            context.abort(code, words)

    def _answers(self, method: Any, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower()
        does = next(getattr(each, name) for each in self._services if hasattr(each, name))
        asked = requests if method.client_streaming else next(requests)
        answered = does(asked, context)
        yield from answered if method.server_streaming else (answered,)


def _read(method: Any, messages: Iterator[bytes]) -> Iterator[Any]:
    kind = GetMessageClass(method.input_type)
    for data in messages:
        try:
            yield kind.FromString(data)
        except DecodeError as error:
            words = f"The bytes of the request are no {method.input_type.name}; nothing was done."
            raise InvalidArgument(words, reason="REQUEST_UNREADABLE") from error
