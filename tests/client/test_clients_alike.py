"""Both clients say the same: one text makes the calls of both, and neither has more than that."""

from __future__ import annotations

import inspect
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from apollo_client import (
    ApolloClient,
    AsyncApolloClient,
    AsyncRunsStream,
    AsyncRunStream,
    AsyncStream,
    RunsStream,
    RunStream,
    Stream,
)

CHECK = Path(__file__).parents[2] / ".ci/check-calls.py"
PAIRS = [
    (ApolloClient, AsyncApolloClient),
    (Stream, AsyncStream),
    (RunStream, AsyncRunStream),
    (RunsStream, AsyncRunsStream),
]


def public(kind: type) -> dict[str, tuple[str, str | None]]:
    """Each method's parameters, types and docstring."""
    methods = inspect.getmembers(kind, inspect.isfunction)
    return {
        name: (str(inspect.signature(method)).replace("Async", ""), method.__doc__)
        for name, method in methods
        if name == "__init__" or not name.startswith("_")
    }


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS)
def test_both_have_the_same_methods_parameters_and_docstrings(blocking, asynchronous):
    told = public(blocking)
    assert told == public(asynchronous)
    assert all(doc for name, (_, doc) in told.items() if name != "__init__")


def test_a_call_is_awaited_in_one_client_alone_and_a_stream_in_none():
    for name, method in inspect.getmembers(AsyncApolloClient, inspect.isfunction):
        if name in public(ApolloClient) and name != "__init__":
            streams = "Stream" in str(inspect.signature(method).return_annotation)
            assert inspect.iscoroutinefunction(method) is not streams, name
            assert not inspect.iscoroutinefunction(getattr(ApolloClient, name)), name


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The step of `make check`, as a module."""
    spec = spec_from_file_location("check_calls", CHECK)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(CHECK)])
    return module


def test_the_checked_in_calls_are_the_generated_ones(check):
    check.main()
    for source in check.SOURCES:
        first, *_ = check.target(source).read_text().splitlines()
        assert source.name in first and "make protos" in first


def test_a_call_of_either_client_comes_from_a_text_that_is_generated(check):
    written = "\n".join(source.read_text() for source in check.SOURCES)
    own = {"__init__", "close"}
    assert all(f"def {name}(" in written for name in public(AsyncApolloClient).keys() - own)


@pytest.mark.parametrize(
    ("name", "text"),
    [("calls.py", "page_size: int = 0"), ("checkpoint_calls.py", "updates: int = 1")],
)
def test_a_change_of_one_client_alone_is_told_until_it_is_generated(
    check, tmp_path, monkeypatch, name, text
):
    for source in check.SOURCES:
        twin = check.target(source)
        copied = twin.read_text()
        (tmp_path / twin.name).write_text(copied.replace(text, f"{text}0"))
    monkeypatch.setattr(check, "target", lambda source: tmp_path / source.name.removeprefix("aio_"))
    with pytest.raises(SystemExit, match=f"{name} is not what aio_{name} generates; run 'make"):
        check.main()
    with monkeypatch.context() as writing:
        writing.setattr(sys, "argv", [str(CHECK), "--write"])
        check.main()
    check.main()


def test_what_texts_and_comments_say_is_said_of_both(check):
    texts = "'await an AsyncStream'  # async for aio_streams\n"
    code = f"# first\nasync for a in AsyncStream(aio_streams, await b): {texts}"
    made = check.blocking(code, "aio_calls.py")
    assert made.endswith(f"\nfor a in Stream(streams, b): {texts}")
    assert made.startswith("# Generated from aio_calls.py by")
