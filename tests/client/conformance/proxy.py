"""A server in front of another one, which passes every call on and may spoil the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from apollo_grpc.statuses import DETAILS_KEY
from apollo_grpc.transport import Endpoint
from tests.waiting import HANG

# Of a method's name and its answers: those that its caller gets.
Spoil = Callable[[str, Iterator[bytes]], Iterator[bytes]]
# Of the details of an error: those that its caller gets.
SpoilDetails = Callable[[bytes], bytes | None]


def honest(method: str, answers: Iterator[bytes]) -> Iterator[bytes]:
    return answers


class Proxy(grpc.GenericRpcHandler):
    """Passes calls on to the server at an address.

    Attributes:
        answered: methods of which a call was answered well.
    """

    def __init__(self, address: str, spoil: Spoil, details: SpoilDetails):
        self.channel = Endpoint(address).channel()
        self._spoil, self._details = spoil, details
        self.answered: set[str] = set()

    def service(self, handler_call_details: Any) -> Any:
        forward = partial(self._forward, handler_call_details.method)
        return grpc.stream_stream_rpc_method_handler(forward)

    def _forward(self, path: str, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        name = path.strip("/").replace("/", ".")
        call: Any = self.channel.stream_stream(path)(messages, timeout=HANG)
        context.add_callback(call.cancel)
        try:
            for answer in self._spoil(name.rpartition(".")[2], call):
                self.answered.add(name)
                yield answer
        except grpc.RpcError as error:
            self._refuse(error, context)

    def _refuse(self, error: Any, context: Any) -> None:
        sent = [value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY]
        details = self._details(sent[0]) if sent else None
        if details is not None:
            context.set_trailing_metadata(((DETAILS_KEY, details),))
        context.abort(error.code(), error.details())


@contextmanager
def proxied(
    address: str,
    folder: Path,
    spoil: Spoil = honest,
    details: SpoilDetails = lambda sent: sent,
) -> Iterator[tuple[Proxy, str]]:
    """A proxy of a server, and its own address in the folder, as long as it serves."""
    server, proxy = grpc.server(ThreadPoolExecutor(16)), Proxy(address, spoil, details)
    server.add_generic_rpc_handlers((proxy,))
    own = f"unix:{folder}/proxy.sock"
    server.add_insecure_port(own)
    server.start()
    try:
        yield proxy, own
    finally:
        server.stop(None).wait()
        proxy.channel.close()
