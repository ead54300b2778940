"""Writes docs/reference.md: every service, message and enum of apollo.v1, with examples that ran.

Run by `make protos`, and by `make check` with `--check`. Reads apollo_grpc/contract.binpb, the
contract with its comments, and examples.json, which tests/services/test_grpcurl.py runs.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2 as pb

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = ROOT / "apollo_grpc" / "contract.binpb"
EXAMPLES = ROOT / "protos" / "examples.json"
PAGE = ROOT / "docs" / "reference.md"
PACKAGE = "apollo/v1/"
HEADER = """# Reference

Generated from the contract (`protos/apollo/v1`) by `make protos`. A training server tells the same
by itself: `grpcurl -plaintext -unix SOCKET describe apollo.v1.TrainingService.Train`; `grpcurl` and
`buf curl` call it without a proto file.

JSON is protobuf's: 64-bit numbers are strings, bytes base64, times RFC 3339, durations as "1.5s".
A field that is left out has its default.

| way in | `grpcurl ...` |
|---|---|
| a socket | `grpcurl -plaintext -unix -d JSON "$APOLLO_STATE_DIR/training.sock" METHOD` |
| TLS and a token | `grpcurl -cacert CA -H "authorization: Bearer TOKEN" -d JSON HOST:PORT METHOD` |
| certificates | `grpcurl -cacert CA -cert CERTIFICATE -key KEY -d JSON HOST:PORT METHOD` |

What each error means: [errors.md](errors.md).
"""
_KINDS = pb.FieldDescriptorProto
_SCALARS = {
    value.number: value.name.removeprefix("TYPE_").lower()
    for value in _KINDS.Type.DESCRIPTOR.values
}


class Page:
    """The page of one set of descriptors."""

    def __init__(self, files: Sequence[pb.FileDescriptorProto], examples: dict[str, Any]):
        self._files = [file for file in files if file.name.startswith(PACKAGE)]
        self._examples = examples
        self._comments = {
            (file.name, tuple(location.path)): location.leading_comments
            for file in self._files
            for location in file.source_code_info.location
        }

    def text(self) -> str:
        """All of it, as Markdown."""
        return "\n".join((HEADER, *self._services(), *self._types()))

    def _services(self) -> Iterator[str]:
        for file in self._files:
            for number, service in enumerate(file.service):
                yield f"## {service.name}\n\n{self._comment(file, 6, number)}"
                for place, method in enumerate(service.method):
                    yield from self._method(file, (6, number, 2, place), service.name, method)

    def _method(
        self,
        file: pb.FileDescriptorProto,
        path: tuple[int, ...],
        service: str,
        method: pb.MethodDescriptorProto,
    ) -> Iterator[str]:
        asked = _stream(method.client_streaming) + _link(method.input_type)
        answered = _stream(method.server_streaming) + _link(method.output_type)
        yield f"### {service}.{method.name}\n\n{asked} → {answered}\n"
        yield self._comment(file, *path)
        name = f"apollo.v1.{service}.{method.name}"
        if example := self._examples.get(name):
            yield _example(name, example)

    def _types(self) -> Iterator[str]:
        yield "## Messages\n"
        for file in self._files:
            for number, message in enumerate(file.message_type):
                yield from self._message(file, (4, number), "", message)
        yield "## Enums\n"
        for file in self._files:
            for number, enum in enumerate(file.enum_type):
                yield from self._enum(file, (5, number), "", enum)

    def _message(
        self, file: pb.FileDescriptorProto, path: tuple[int, ...], scope: str, message: Any
    ) -> Iterator[str]:
        if message.options.map_entry:
            return
        name = scope + message.name
        yield f"### {name}\n\n{self._comment(file, *path)}"
        if message.field:
            yield "| field | type | |\n|---|---|---|"
            for place, field in enumerate(message.field):
                says = self._comment(file, *path, 2, place).replace("\n", " ").strip()
                yield f"| {field.number} `{field.name}` | {_type(message, field)} | {says} |"
            yield ""
        for place, nested in enumerate(message.nested_type):
            yield from self._message(file, (*path, 3, place), f"{name}.", nested)
        for place, enum in enumerate(message.enum_type):
            yield from self._enum(file, (*path, 4, place), f"{name}.", enum)

    def _enum(
        self, file: pb.FileDescriptorProto, path: tuple[int, ...], scope: str, enum: Any
    ) -> Iterator[str]:
        yield f"### {scope}{enum.name}\n\n{self._comment(file, *path)}"
        for place, value in enumerate(enum.value):
            says = self._comment(file, *path, 2, place).replace("\n", " ").strip()
            yield f"- {value.number} `{value.name}`{': ' if says else ''}{says}"
        yield ""

    def _comment(self, file: pb.FileDescriptorProto, *path: int) -> str:
        lines = self._comments.get((file.name, path), "").splitlines()
        return "".join(f"{line.removeprefix(' ')}\n" for line in lines)


def _stream(streams: bool) -> str:
    return "stream of " if streams else ""


def _link(full_name: str) -> str:
    name = full_name.removeprefix(".apollo.v1.")
    if name.startswith("."):
        return f"`{name[1:]}`"
    return f"[{name}](#{re.sub(r'[^a-z0-9_-]', '', name.lower())})"


def _type(message: Any, field: Any) -> str:
    for nested in message.nested_type:
        if nested.options.map_entry and field.type_name.endswith(f".{message.name}.{nested.name}"):
            key, value = (_type(nested, each) for each in nested.field)
            return f"map of {key} to {value}"
    kind = _link(field.type_name) if field.type_name else _SCALARS[field.type]
    if field.label == _KINDS.LABEL_REPEATED:
        return f"repeated {kind}"
    if field.proto3_optional:
        return f"optional {kind}"
    if field.HasField("oneof_index"):
        return f"{kind}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return kind


def _example(name: str, example: dict[str, Any]) -> str:
    service, _, method = name.rpartition(".")
    asked = json.dumps(example["request"], ensure_ascii=False)
    answers = "\n".join(
        json.dumps(each, ensure_ascii=False, indent=2) for each in example["answers"]
    )
    return f"```console\n$ grpcurl ... -d '{asked}' {service}/{method}\n{answers}\n```\n"


def main(arguments: Sequence[str]) -> None:
    """Writes the page, or fails where it is another one."""
    files = pb.FileDescriptorSet.FromString(CONTRACT.read_bytes()).file
    text = Page(files, json.loads(EXAMPLES.read_text())).text()
    if "--check" not in arguments:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit("check: docs/reference.md is not what protos/ generates; run 'make protos'")


if __name__ == "__main__":
    main(sys.argv[1:])
