"""Server reflection (grpc.reflection.v1 and v1alpha) with the contract's comments.

grpcio-reflection answers from the descriptors of the running process, which hold no comments, and
knows no symbol of a method; `grpcurl describe` would show neither. Its messages are used here, as
those of both versions are the same on the wire.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from importlib.resources import files
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2 as pb

from apollo_grpc.errors import ApolloError, InvalidArgument, NotFound

NAMES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
CONTRACT = "contract.binpb"
File = descriptor_pb2.FileDescriptorProto


class Reflection:
    """Tells of services and of all that they are made of. On an event loop.

    Args:
        services: full names; those that are not of the contract are described as the process knows
            them.
    """

    def __init__(self, services: Sequence[str]):
        self._services = sorted(services)
        self._files, self._symbols = dict[str, File](), dict[str, str]()
        for file in contract_files():
            self._add(file)
        for name in services:
            if name not in self._symbols:
                self._add(_of_process(name))
        self._extensions = {
            (extension.extendee.lstrip("."), extension.number): file.name
            for file in self._files.values()
            for extension in file.extension
        }

    def _add(self, file: File) -> None:
        self._files[file.name] = file
        self._symbols |= dict.fromkeys(_symbols(file), file.name)

    def add_to(self, server: Any) -> None:
        """Registers both versions with a `grpc.aio.Server`."""
        handler = grpc.stream_stream_rpc_method_handler(
            self._answers,
            request_deserializer=pb.ServerReflectionRequest.FromString,
            response_serializer=pb.ServerReflectionResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})
                for name in NAMES
            ]
        )

    async def _answers(
        self, requests: AsyncIterator[pb.ServerReflectionRequest], context: Any
    ) -> AsyncIterator[pb.ServerReflectionResponse]:
        async for request in requests:
            answer = pb.ServerReflectionResponse(valid_host=request.host, original_request=request)
            try:
                self._fill(answer, request)
            except ApolloError as error:
                answer.error_response.error_code = error.code.value[0]
                answer.error_response.error_message = error.message
            yield answer

    def _fill(
        self, answer: pb.ServerReflectionResponse, request: pb.ServerReflectionRequest
    ) -> None:
        kind = request.WhichOneof("message_request")
        if kind == "list_services":
            for name in self._services:
                answer.list_services_response.service.add(name=name)
        elif kind == "file_by_filename":
            self._tell(answer, request.file_by_filename)
        elif kind == "file_containing_symbol":
            self._tell(answer, self._symbols.get(request.file_containing_symbol.lstrip("."), ""))
        elif kind == "file_containing_extension":
            asked = request.file_containing_extension
            key = (asked.containing_type.lstrip("."), asked.extension_number)
            self._tell(answer, self._extensions.get(key, ""))
        elif kind == "all_extension_numbers_of_type":
            name = request.all_extension_numbers_of_type.lstrip(".")
            numbers = sorted(n for extended, n in self._extensions if extended == name)
            if name not in self._symbols:
                raise NotFound("Symbol not found.", reason="SYMBOL_NOT_FOUND")
            answer.all_extension_numbers_response.base_type_name = name
            answer.all_extension_numbers_response.extension_number.extend(numbers)
        else:
            raise InvalidArgument("The request asks for nothing that is known.")

    def _tell(self, answer: pb.ServerReflectionResponse, name: str) -> None:
        if name not in self._files:
            raise NotFound("Symbol not found.", reason="SYMBOL_NOT_FOUND")
        answer.file_descriptor_response.file_descriptor_proto.extend(
            file.SerializeToString() for file in self._with_imports(name, set())
        )

    def _with_imports(self, name: str, told: set[str]) -> Iterator[File]:
        told.add(name)
        yield self._files[name]
        for imported in self._files[name].dependency:
            if imported not in told and imported in self._files:
                yield from self._with_imports(imported, told)


def contract_files() -> Sequence[File]:
    """The files of apollo.v1 and what they import, with their comments."""
    data = files("apollo_grpc").joinpath(CONTRACT).read_bytes()
    return descriptor_pb2.FileDescriptorSet.FromString(data).file


def _of_process(service: str) -> File:
    found, proto = descriptor_pool.Default().FindFileContainingSymbol(service), File()
    found.CopyToProto(proto)
    return proto


def _symbols(file: File) -> Iterator[str]:
    for service in file.service:
        name = f"{file.package}.{service.name}"
        yield name
        yield from (f"{name}.{method.name}" for method in service.method)
    for enum in file.enum_type:
        yield from _of_enum(f"{file.package}.", enum)
    for message in file.message_type:
        yield from _of_message(f"{file.package}.", message)
    yield from (f"{file.package}.{extension.name}" for extension in file.extension)


def _of_message(scope: str, message: descriptor_pb2.DescriptorProto) -> Iterator[str]:
    name = f"{scope}{message.name}"
    yield name
    yield from (f"{name}.{field.name}" for field in message.field)
    yield from (f"{name}.{oneof.name}" for oneof in message.oneof_decl)
    for enum in message.enum_type:
        yield from _of_enum(f"{name}.", enum)
    for nested in message.nested_type:
        yield from _of_message(f"{name}.", nested)


def _of_enum(scope: str, enum: descriptor_pb2.EnumDescriptorProto) -> Iterator[str]:
    yield f"{scope}{enum.name}"
    # Values are named beside their enum, not in it.
    yield from (f"{scope}{value.name}" for value in enum.value)
