"""Writes docs/errors.md: every reason by which a server says why, and what to do.

Run by `make protos`, and by `make check` with `--check`. Reads apollo_grpc/contract.binpb, the
contract with its comments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf import descriptor_pb2 as pb

from apollo_grpc.v1 import reason_pb2

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = ROOT / "apollo_grpc" / "contract.binpb"
PAGE = ROOT / "docs" / "errors.md"
SOURCE = "apollo/v1/reason.proto"
NO_CODE = "No error"
HEADER = """# Errors

Generated from the contract (`protos/apollo/v1/reason.proto`) by `make protos`. Look for the word
that you see: `apollo` shows it in brackets after a message; programs read it as `error.reason`, or
from the ErrorInfo of a gRPC status (domain "apollo.dev").

A call ends with the code above its table. A run that fails does not end its stream with a code: its
`finished` event says FAILED, and the word and the message in `failure`. An operation does both. Why
an engine is not attached is in `attachment_detail` of the status, the word in brackets.

*Again* means that the same call or run may be sent again as it is. Where RetryInfo comes with it,
nothing was done, and the clients of this package send it again by themselves. BadRequest has the
path of each wrong field, QuotaFailure the limit (named as in `ServerLimits`, if that has it),
ResourceInfo what the error is about; clients have them as `violations`, `quota` and `resource`.

Where the word is the name of a code and has no line here, gRPC itself ended the call, or that of
the training server to vLLM's sidecar.
"""
LAST = f"""## {NO_CODE}

Why a run was taken back or ended early, and warnings, which change no outcome.
"""


def text(file: pb.FileDescriptorProto) -> str:
    """All of the page, as Markdown."""
    rows = sorted(_rows(file))
    codes = sorted({code for code, *_ in rows} - {NO_CODE})
    parts = [HEADER]
    for code in [*codes, NO_CODE]:
        parts.append(LAST if code == NO_CODE else f"## {code}\n")
        parts.append("| reason | when | again | what to do |\n|---|---|---|---|")
        parts += [f"| {' | '.join(row)} |" for of, *row in rows if of == code]
        parts.append("")
    return "\n".join(parts)


def _rows(file: pb.FileDescriptorProto) -> Iterator[tuple[str, ...]]:
    """Code, and the cells of its table's line; a reason of two codes is in both tables."""
    (enum,) = file.enum_type
    comments = {tuple(at.path): at.leading_comments for at in file.source_code_info.location}
    for place, value in enumerate(enum.value):
        if not value.number:
            continue
        info = value.options.Extensions[reason_pb2.reason_info]
        word = value.name.removeprefix("REASON_")
        says = " ".join(comments[5, 0, 2, place].split())
        for code in info.codes or [NO_CODE]:
            yield code, f"`{word}`", says, "yes" if info.retryable else "", info.action


def main(arguments: Sequence[str]) -> None:
    """Writes the page, or fails where it is another one."""
    files = pb.FileDescriptorSet.FromString(CONTRACT.read_bytes()).file
    made = text(next(file for file in files if file.name == SOURCE))
    if "--check" not in arguments:
        PAGE.write_text(made)
    elif not PAGE.exists() or PAGE.read_text() != made:
        sys.exit("check: docs/errors.md is not what protos/ generates; run 'make protos'")


if __name__ == "__main__":
    main(sys.argv[1:])
