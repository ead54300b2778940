"""Tools and calls of them, as OpenAI's format has them.

What is written as objects has no nulls: tables fill their columns with these. JSON text stays as
it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from apollo_client.sample_values import a_list, a_text, is_nothing, shown
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb


def tools(place: str, value: Any) -> list[str]:
    """The JSON text of each tool of a list, which may itself be JSON text.

    Raises InvalidArgument at the wrong one, as all of these do.
    """
    if isinstance(value, str):
        listed = _all(place, _parsed(place, value or "[]"))
        return [json.dumps(_object(place, each), ensure_ascii=False) for each in listed]
    return [_json(f"{place}[{index}]", each) for index, each in enumerate(_all(place, value))]


def tool_calls(place: str, value: Any) -> list[pb.ToolCall]:
    """The calls of a message."""
    return [_call(f"{place}[{index}]", each) for index, each in enumerate(_all(place, value))]


def _all(place: str, value: Any) -> list[Any]:
    return a_list(place, value, "objects")


def _call(place: str, call: Any) -> pb.ToolCall:
    """A call's id, and the name and arguments of its function."""
    fields = _known(place, call, ("id", "type", "function"))
    if fields.get("type", "function") != "function":
        raise InvalidArgument.at(f"{place}.type", "is not function: vLLM shows no other")
    function = _known(f"{place}.function", fields.get("function"), ("name", "arguments"))
    given = function.get("arguments", "")
    at = f"{place}.function.arguments"
    if isinstance(given, str):
        # Shown as an empty object by vLLM, where it is none.
        _object(at, _parsed(at, given or "{}"))
    return pb.ToolCall(
        id=a_text(f"{place}.id", fields.get("id", "")),
        name=a_text(f"{place}.function.name", function.get("name")),
        arguments=a_text(at, given) if isinstance(given, str) else _json(at, given),
    )


def _known(place: str, value: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """What an object says; it has no other keys."""
    fields = {key: each for key, each in _object(place, value).items() if not is_nothing(each)}
    for key in fields:
        if key not in keys:
            says = f"is no key of a call; it has {', '.join(keys)}"
            raise InvalidArgument.at(f"{place}.{shown(key)}", says)
    return fields


def _object(place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidArgument.at(place, "is no JSON object")
    return value


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument.at(place, "is no JSON text") from error


def _json(place: str, value: Any) -> str:
    """The JSON text of an object."""
    try:
        text = json.dumps(
            _without_nulls(_object(place, value)), ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument.at(place, "cannot be written as JSON") from error
    return a_text(place, text)


def _without_nulls(value: Any) -> Any:
    """The same, with lists for arrays: those of a table that was read from Parquet."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_without_nulls(each) for each in value] if isinstance(value, list | tuple) else value
