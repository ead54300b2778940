"""Which reasons the source tells, and with which codes: read from its syntax trees alone.

A reason is a literal given to an error of `apollo_grpc.errors`, to a `Notice`, or to any class or
function with an argument `reason` that hands it on to one of these.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from apollo_grpc.errors import ApolloError

ARGUMENT = "reason"
NO_CODE = ""
BY_NAME = -1
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Node = ast.Call | ast.Assign | Definition


@dataclass(frozen=True)
class Told:
    """One reason at one place of the source.

    Attributes:
        code: of the error; empty for a notice.
        again: the error says after how long the call may be made again.
    """

    reason: str
    code: str
    place: str
    again: bool


@dataclass
class _Teller:
    """A class or function that takes a reason.

    Attributes:
        position: of the reason among its arguments.
        codes: of the errors that it makes.
        default: told where none is given.
    """

    position: int
    codes: set[str] = field(default_factory=set)
    default: str = ""


class Source:
    """The modules of some folders, but those that are generated."""

    def __init__(self, *folders: Path):
        paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
        self._trees = {
            path: ast.parse(path.read_text()) for path in paths if "v1" not in path.parts
        }
        self._nodes = {path: list(_nodes(tree)) for path, tree in self._trees.items()}
        self._tellers = {"Notice": _Teller(0, {NO_CODE})}
        for error in (ApolloError, *ApolloError.__subclasses__()):
            known = _Teller(BY_NAME, {error.code.name}, error.default_reason)
            self._tellers[error.__name__] = known
        self._known = set(self._tellers)
        # A class may come before its parent, and a function before the one that it hands on to.
        while self._learned_more():
            pass

    def told(self) -> Iterator[Told]:
        """Every reason; where an error is given none, its default."""
        for path, tree in self._trees.items():
            for node, around in self._nodes[path]:
                found: Iterator[tuple[str, set[str]]] = iter(())
                if isinstance(node, ast.Call):
                    found = self._told_by(node, tree, around)
                elif isinstance(node, ast.Assign):
                    found = ((text, self._codes_of(tree, ARGUMENT)) for text in _assigned(node))
                for reason, codes in found:
                    place, again = f"{path}:{node.lineno}", _again(node)
                    yield from (Told(reason, code, place, again) for code in codes)

    def _told_by(
        self, call: ast.Call, tree: ast.Module, around: Sequence[Definition]
    ) -> Iterator[tuple[str, set[str]]]:
        teller = self._teller(call, tree)
        if teller is None:
            return
        given = _given(call, ARGUMENT, teller.position)
        if given is not None:
            for text in self._texts(given, around):
                yield text, teller.codes
        elif teller.default and all(keyword.arg for keyword in call.keywords):
            yield teller.default, teller.codes

    def _texts(self, given: ast.expr, around: Sequence[Definition]) -> Iterator[str]:
        """Texts that an expression may be; none where it hands on what somebody else told."""
        match given:
            case ast.Constant(value=str(text)) if text:
                yield text
            case ast.IfExp(body=one, orelse=other):
                yield from self._texts(one, around)
                yield from self._texts(other, around)
            case ast.JoinedStr(
                values=[ast.Constant(value=str(begin)), ast.FormattedValue() as end]
            ):
                # As in f"TOO_MANY_{self._what.upper()}".
                *_, variable, made = ast.unparse(end.value).split(".")
                assert made == "upper()", f"{made} of what is given is not understood"
                for text in self._arguments_given(around, variable.lstrip("_")):
                    yield begin + text.upper()

    def _arguments_given(self, around: Sequence[Definition], name: str) -> Iterator[str]:
        """Texts given as an argument of the innermost definition that has one of this name."""
        owner = next(each for each in reversed(around) if name in _arguments(each))
        for node, _ in chain.from_iterable(self._nodes.values()):
            if isinstance(node, ast.Call) and _name(node.func) == owner.name:
                given = _given(node, name, _arguments(owner).index(name))
                yield from self._texts(given or _default(owner, name), ())

    def _learned_more(self) -> bool:
        before = sum(len(teller.codes) for teller in self._tellers.values())
        for path, tree in self._trees.items():
            for node, _ in self._nodes[path]:
                if isinstance(node, Definition) and node.name not in self._known:
                    self._learn(node, tree)
        return sum(len(teller.codes) for teller in self._tellers.values()) > before

    def _learn(self, node: Definition, tree: ast.Module) -> None:
        arguments = _arguments(node)
        position = arguments.index(ARGUMENT) if ARGUMENT in arguments else BY_NAME
        bases = [_name(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
        if parent := next((self._tellers[base] for base in bases if base in self._tellers), None):
            default = next(_assigned(node, "default_reason"), parent.default)
            self._tellers[node.name] = _Teller(position, parent.codes, default)
        elif position != BY_NAME:
            inside = _function(node)
            codes = self._codes_of(inside or tree, ARGUMENT if inside else f".{ARGUMENT}")
            if codes and node.name != "__init__":
                self._tellers.setdefault(node.name, _Teller(position)).codes |= codes

    def _codes_of(self, inside: ast.AST, name: str) -> set[str]:
        """Codes of what is made with a reason from a variable or an attribute of this name."""
        codes = set[str]()
        for node in ast.walk(inside):
            if isinstance(node, ast.Call) and (teller := self._teller(node)):
                given = _given(node, ARGUMENT, teller.position)
                dot = "." if isinstance(given, ast.Attribute) else ""
                if given is not None and dot + _name(given) == name:
                    codes |= teller.codes
        return codes

    def _teller(self, call: ast.Call, tree: ast.Module | None = None) -> _Teller | None:
        function = call.func
        if isinstance(function, ast.Attribute) and function.attr == "at":
            function = function.value
        name = _name(function)
        own = next((d for d in (tree.body if tree else ()) if getattr(d, "name", "") == name), None)
        if isinstance(own, ast.FunctionDef) and ARGUMENT not in _arguments(own):
            return None
        # A callable that is kept as `_warn` may be the method `warn` of somebody else, or `_warn`.
        return self._tellers.get(name) or self._tellers.get(name.lstrip("_"))


def _nodes(
    node: ast.AST, around: tuple[Definition, ...] = ()
) -> Iterator[tuple[Node, tuple[Definition, ...]]]:
    """Calls, assignments and definitions below, each with the definitions that it is in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Node):
            yield child, around
        yield from _nodes(child, (*around, child) if isinstance(child, Definition) else around)


def _again(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and any(k.arg == "retry_seconds" for k in node.keywords)


def _name(node: ast.AST) -> str:
    """The last name of `a.b.c`."""
    return getattr(node, "attr", "") or getattr(node, "id", "")


def _function(node: Definition) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The function itself, or the `__init__` of a class."""
    if not isinstance(node, ast.ClassDef):
        return node
    inside = (each for each in node.body if isinstance(each, ast.FunctionDef))
    return next((each for each in inside if each.name == "__init__"), None)


def _arguments(node: Definition) -> list[str]:
    """Names of arguments in their order; the fields of a class without an `__init__`."""
    function = _function(node)
    if function is None:
        fields = (each.target for each in node.body if isinstance(each, ast.AnnAssign))
        return [_name(each) for each in fields]
    given = [each.arg for each in (*function.args.args, *function.args.kwonlyargs)]
    return given[1:] if given[:1] in (["self"], ["cls"]) else given


def _default(node: Definition, name: str) -> ast.expr:
    function = _function(node)
    assert function is not None
    pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return {each.arg: default for each, default in pairs}.get(name) or ast.Constant("")


def _given(call: ast.Call, name: str, position: int) -> ast.expr | None:
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    return call.args[position] if 0 <= position < len(call.args) else None


def _assigned(node: ast.AST, name: str = ARGUMENT) -> Iterator[str]:
    """Literals that are assigned to a variable inside, also `other, reason = ..., "REASON"`."""
    for each in ast.walk(node):
        if isinstance(each, ast.Assign):
            targets, values = each.targets, [each.value]
            if isinstance(targets[0], ast.Tuple) and isinstance(each.value, ast.Tuple):
                targets, values = targets[0].elts, each.value.elts
            for target, value in zip(targets, values, strict=False):
                if _name(target) == name and isinstance(value, ast.Constant) and value.value:
                    yield str(value.value)
