"""Whatever a file of samples holds, `apollo train` ends as it says, without a traceback."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from apollo_client.command.app import app

# Building it takes longer than running it.
APOLLO = get_command(app)
EXAMPLES = int(os.environ.get("SOAK_MALFORMED", "80"))
FUZZED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
DONE, REFUSED, WRONG_INPUT, UNREACHABLE = 0, 1, 2, 3
NOWHERE = "unix:/nowhere/training.sock"

GOOD = [
    {"context": "The sea is", "continuation": " deep."},
    {"context_ids": [1, 2, 3], "continuation_ids": [4], "weight": 0.5},
    {
        "messages": [
            {"role": "user", "content": "a\u2028b", "name": None},
            {"role": "assistant", "content": [{"type": "text", "text": "c"}], "weight": 1},
        ]
    },
]
SAMPLE_KEYS = (
    *("context", "continuation", "context_ids", "continuation_ids", "messages"),
    *("teacher_context", "teacher_context_ids", "teacher_messages"),
    *("advantages", "sampler_log_probabilities"),
)
MESSAGE_KEYS = ("role", "content", "weight", "type", "text", "tool_calls")
KEYS = st.sampled_from([*SAMPLE_KEYS, *MESSAGE_KEYS, "token_weights", "id", "\ud800"])
LEAVES = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2**31, 10**400, 1e308, float("nan"), float("inf")])
    | st.sampled_from(["", "a", "user", "assistant", "Assistant", "text", "\ud83d", "\x1b[31m"])
    | st.text(max_size=5)
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)
SAMPLES = st.sampled_from(GOOD) | st.dictionaries(KEYS, JSON, max_size=4) | JSON


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good file, some bytes of it changed, doubled, lost or put elsewhere."""
    data = written(draw(st.lists(st.sampled_from(GOOD), min_size=1, max_size=3)), draw)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 20)))
        put = draw(
            st.sampled_from([b"", data[start:end] * 2, data[end:], b'"', b"}", b"\0", b"\xff"])
            | st.sampled_from([b"\n", b"\r\n", b",", b"[", b"null", b"NaN", b"\xef\xbb\xbf"])
            | st.binary(max_size=3)
        )
        data = data[:start] + put + data[end:]
    return data


def written(values: list[object], draw: st.DrawFn) -> bytes:
    """Values in one of the ways that people write them."""
    plain = draw(st.booleans())
    indent = draw(st.sampled_from([None, 1]))
    if draw(st.integers(0, 3)) == 0:
        text = json.dumps(values, indent=indent, ensure_ascii=plain)
    else:
        end = draw(st.sampled_from(["\n", "\r\n", "\n\n", ""]))
        text = end.join(json.dumps(each, indent=indent, ensure_ascii=plain) for each in values)
    encoding = draw(st.sampled_from(["utf-8"] * 5 + ["utf-8-sig", "utf-16", "utf-32", "latin-1"]))
    return text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")


@st.composite
def shaped(draw: st.DrawFn) -> bytes:
    """JSON of any shape; now and then deeper than a parser goes."""
    data = written(draw(st.lists(SAMPLES, max_size=3)), draw)
    if draw(st.integers(0, 9)) == 0:
        opened, closed = draw(st.sampled_from([(b"[", b"]"), (b'{"a":', b"}")]))
        deep = draw(st.sampled_from([500, 2_000, 100_000]))
        data += opened * deep + closed * draw(st.sampled_from([0, deep]))
    return data


def apollo(*arguments: str, input: bytes = b"") -> tuple[int, str]:
    """How the command ends, and what it says then. What it does not catch is raised."""
    with CliRunner().isolation(input=input) as (_, stderr, _):
        with pytest.raises(SystemExit) as left:
            APOLLO.main(list(arguments), prog_name="apollo")
        sys.stderr.flush()
        return int(left.value.code or 0), stderr.getvalue().decode()


def ending(data: bytes, path: Path) -> int:
    """How the command ends with these bytes; the same from a file as from standard input."""
    path.write_bytes(data)
    status, told = apollo("--address", NOWHERE, "train", str(path))
    piped = apollo("--address", NOWHERE, "train", "-", input=data)
    assert piped == (status, told.replace(str(path), "stdin")), data
    assert status in (WRONG_INPUT, UNREACHABLE), data
    assert "Traceback" not in told and len(told) < 20_000
    assert status == UNREACHABLE or told.startswith(f"apollo: {path}"), data
    return status


def tried(server: str, path: Path) -> tuple[int, str]:
    """How a server that is attached ends it; on a busy machine it loses its engine for a moment."""
    while True:
        status, told = apollo("--address", server, "train", str(path), "--dry-run", "--json")
        if "(ENGINE_" not in told:
            return status, told
        assert status == REFUSED


@FUZZED
@given(data=st.binary(max_size=60) | mutated() | shaped())
def test_any_bytes_end_in_a_documented_status(
    data: bytes, server: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "samples.jsonl"
    status = ending(data, path)
    if status == UNREACHABLE:
        status, told = tried(server, path)
        right = not told if status == DONE else told.startswith(f"apollo: {path}:")
        assert right and status in (DONE, WRONG_INPUT), (data, told)
    event(f"status {status}")


def test_a_file_that_is_right_is_learned_and_one_that_is_wrong_is_told(server, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"\n".join(json.dumps(each).encode() for each in GOOD))
    assert apollo("--address", server, "train", str(path), "--dry-run") == (DONE, "")
    assert ending(path.read_bytes(), path) == UNREACHABLE
    assert ending(b'{"context": "a"', path) == WRONG_INPUT


def test_a_file_may_have_names_of_its_own(server, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "The sea is", "answer": " deep.", "source": "a poem"}\n')
    mapped = ("--map", "prompt=question", "--map", "completion=answer")
    assert apollo("--address", server, "train", str(path), "--dry-run", *mapped) == (DONE, "")
    status, told = apollo("--address", server, "train", str(path), "--map", "prompt")
    assert status == WRONG_INPUT and "it must be KEY=NAME" in told
