"""Writes docs/python.md: what `apollo_client` and `apollo_client.testing` export, by docstrings.

Run by `make protos`, and by `make check` with `--check`. Signatures are those of the source.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import apollo_client
import apollo_client.testing

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "python.md"
CLIENT = ROOT / "client" / "apollo_client"
HEADER = """# Python client

Generated from the docstrings by `make protos`. `pip install apollo-grpc` brings the client and
neither torch nor vLLM; [Recipes](recipes.md) has programs to begin from.

```python
from apollo_client import ApolloClient

with ApolloClient() as client:
    result = client.train([("The capital of Aldovia is", " Port Lumen.")], epochs=20).result()
    print(result.state, result.losses[-1])
```

`AsyncApolloClient` has the same calls, awaited; its `AsyncStream`, `AsyncRunStream` and
`AsyncRunsStream` are gone through by `async for`. Errors are `ApolloError` of `apollo_grpc.errors`;
`error.reason` is a word of [Errors](errors.md). Messages are those of [the contract](reference.md),
from `apollo_grpc.v1`. Clients, streams and the fake server are closed by `with`.
"""
TESTING = """## Fake server

`apollo_client.testing`: [Your own tests](testing.md) has examples.
"""
# A module of generated messages, as the source calls it.
_MESSAGE = re.compile(r"\b(?:\w+_pb2|pb)\.([\w.]+)")
_ARGUMENT = re.compile(r", (?=\*{0,2}\w+:|\*,)")
_WIDTH = 88
_SECTIONS = {"Args:": "Arguments:", "Attributes:": "Attributes:"}
# What calls return, and nobody makes.
_GIVEN = ("apollo_client.streams",)


def text() -> str:
    """All of the page, as Markdown."""
    parts = [HEADER, *_exports(apollo_client), TESTING, *_exports(apollo_client.testing)]
    return "\n".join(parts)


def _exports(module: ModuleType) -> Iterator[str]:
    for name in module.__all__:
        value = getattr(module, name)
        if name.startswith("Async"):
            continue
        yield f"## {name}\n" if module is apollo_client else f"### {name}\n"
        if hasattr(value, "DESCRIPTOR"):
            yield _links([value.DESCRIPTOR.full_name.removeprefix("apollo.v1.")])
        elif inspect.isclass(value):
            yield from _class(value)
        elif inspect.isfunction(value):
            yield from _call(value, name)
        else:
            yield _code(_alias(name))


def _class(kind: type) -> Iterator[str]:
    fields = [each for each in _tree(kind).body if isinstance(each, ast.AnnAssign)]
    if fields:
        yield _code("\n".join(_short(ast.unparse(each)) for each in fields))
    elif "__init__" in vars(kind) and kind.__module__ not in _GIVEN:
        yield _code(_signature(vars(kind)["__init__"], kind.__name__))
    yield _prose(kind)
    for owner in kind.__mro__:
        members = {n: m for n, m in vars(owner).items() if not n.startswith("_")}
        members = {n: m for n, m in members.items() if isinstance(m, FunctionType | property)}
        if not members or not owner.__module__.startswith("apollo_client"):
            continue
        if owner is not kind and kind.__module__ not in _GIVEN:
            yield f"### {_heading(owner)}\n"
            yield from filter(None, [_prose(owner, skip=1)])
        for name, member in members.items():
            yield f"#### {kind.__name__}.{name}\n"
            yield from _call(member, name)


def _call(member: Any, name: str) -> Iterator[str]:
    """Signature, text, and the messages that come back."""
    function = member.fget if isinstance(member, property) else member
    shown = _signature(function, name)
    yield _code(re.sub(r"\(\)(?= ->)", "", shown) if function is not member else shown)
    yield _prose(function)
    returned = ast.unparse(_tree(function).returns or ast.Constant(None))
    if found := _MESSAGE.findall(returned):
        yield _links(found)


def _links(messages: Sequence[str]) -> str:
    shown = (f"[{each}](reference.md#{each.replace('.', '').lower()})" for each in messages)
    return f"Message: {', '.join(shown)}.\n"


def _tree(value: Any) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]


def _signature(function: Any, name: str) -> str:
    """As the source has it, an argument a line where one line is too short."""
    tree = _tree(function)
    arguments = tree.args
    if arguments.args and arguments.args[0].arg == "self":
        del arguments.args[0]
    for defaults in (arguments.defaults, arguments.kw_defaults):
        defaults[:] = [_value(each, function) for each in defaults]
    parts = [re.sub(r"^([^=]*[^= ])=", r"\1 = ", each) for each in _split(ast.unparse(arguments))]
    returns = "" if name[0].isupper() else f" -> {ast.unparse(tree.returns)}"
    line = _short(f"{name}({', '.join(parts)}){returns}")
    if len(line) <= _WIDTH:
        return line
    return "\n".join(
        [f"{name}(", *(f"    {_short(each)}," for each in parts), f"){_short(returns)}"]
    )


def _value(default: Any, function: Any) -> Any:
    """What a default's name stands for."""
    if not isinstance(default, ast.Name | ast.Attribute):
        return default
    first, *rest = ast.unparse(default).split(".")
    return ast.Constant(reduce(getattr, rest, function.__globals__[first]))


def _split(arguments: str) -> list[str]:
    return [each for each in _ARGUMENT.split(arguments) if each]


def _short(code: str) -> str:
    """Without what only its file needs."""
    code = re.sub(r"field\(default=(.*?), repr=False\)", r"\1", code)
    return _MESSAGE.sub(r"\1", code).replace("''", '""')


def _alias(name: str) -> str:
    """What defines a type that has no docstring."""
    for path in CLIENT.glob("*.py"):
        for each in ast.parse(path.read_text()).body:
            if isinstance(each, ast.AnnAssign) and ast.unparse(each.target) == name:
                return _short(f"{name} = {ast.unparse(each.value or each)}")
    raise LookupError(f"{name} is defined nowhere")


def _code(code: str) -> str:
    return f"```python\n{code}\n```\n"


def _heading(owner: type) -> str:
    return inspect.cleandoc(owner.__doc__ or "").splitlines()[0].rstrip(".")


def _prose(value: Any, skip: int = 0) -> str:
    """A docstring, its lists of arguments as lists.

    Args:
        skip: lines that are left out.
    """
    lines = inspect.cleandoc(value.__doc__ or "").splitlines()[skip:]
    made = list[str]()
    for line in lines:
        entry = re.match(r"    ([\w, ]+): (.*)", line)
        if line in ("Args:", "Attributes:"):
            made += [_SECTIONS[line], ""]
        elif entry and not line.startswith("        "):
            names = ", ".join(f"`{each}`" for each in entry[1].split(", "))
            made.append(f"- {names}: {entry[2]}")
        else:
            made.append(re.sub("^        ", "  ", line))
    return "\n".join([*made, ""]).lstrip("\n")


def main(arguments: Sequence[str]) -> None:
    """Writes the page, or fails where it is another one."""
    made = text()
    if "--check" not in arguments:
        PAGE.write_text(made)
    elif not PAGE.exists() or PAGE.read_text() != made:
        sys.exit("check: docs/python.md is not what the docstrings generate; run 'make protos'")


if __name__ == "__main__":
    main(sys.argv[1:])
