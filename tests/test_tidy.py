"""The few rules of the house that a machine can hold: who imports whom, sizes, names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT, ROOT / "client", ROOT / "server"]
# From the bottom to the top: a room imports from those before it, and from none after.
ROOMS = [
    "apollo_grpc",
    "apollo_client",
    "apollo_client.testing",
    "apollo_client.command",
    "apollo_client.conformance",
    "apollo_sidecar",
    "apollo_trainer.logs",
    "apollo_trainer.config",
    "apollo_trainer.ledger",
    "apollo_trainer.parallel",
    "apollo_trainer.weights",
    "apollo_trainer.optim",
    "apollo_trainer.training",
    "apollo_trainer.requests",
    "apollo_trainer.checkpoints.host_memory",
    "apollo_trainer.checkpoints.disk",
    "apollo_trainer.datasets",
    "apollo_trainer.checkpoints.apollo_state",
    "apollo_trainer.checkpoints.directory",
    "apollo_trainer.checkpoints.snapshots",
    "apollo_trainer.engine",
    "apollo_trainer.operations",
    "apollo_trainer.runs",
    "apollo_trainer.watching",
    "apollo_trainer.services",
    "apollo_trainer",
]
# These import nothing of each other, though one stands before the other.
APART = ["apollo_client", "apollo_sidecar", "apollo_trainer"]
# What other rooms may use of these is what their `__init__` lists.
FRONTS = [
    "apollo_trainer.ledger",
    "apollo_trainer.checkpoints.disk",
    "apollo_trainer.datasets",
    "apollo_trainer.checkpoints.apollo_state",
    "apollo_trainer.checkpoints.directory",
    "apollo_trainer.checkpoints.snapshots",
    "apollo_trainer.engine",
    "apollo_trainer.operations",
    "apollo_trainer.runs",
]
# A room, and what it may not know.
UNKNOWN = {
    "apollo_trainer.ledger": {"torch", "numpy", "transformers"},
    "apollo_trainer.services": {"torch", "numpy", "transformers"},
    "apollo_trainer.datasets": {"torch", "numpy", "transformers"},
    "apollo_trainer.optim": {"grpc", "apollo_grpc.v1", "apollo_grpc.sidecar"},
    "apollo_trainer.training": {"grpc", "apollo_grpc.v1", "apollo_grpc.sidecar"},
    "apollo_trainer.checkpoints": {"grpc", "apollo_grpc.v1", "apollo_grpc.sidecar"},
    "apollo_client": {"torch", "vllm", "transformers"},
    "apollo_sidecar": {"transformers"},
}
LINES = 300
FORBIDDEN = re.compile(r"(?:^|_)(utils?|helpers?|managers?|common|misc|tmp)(?:_|$)")


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the product, but those that are generated."""
    for source in SOURCES:
        for package in source.glob("apollo_*"):
            for path in package.rglob("*.py"):
                parts = path.relative_to(source).with_suffix("").parts
                if "v1" not in parts:
                    yield ".".join(parts).removesuffix(".__init__"), path


MODULES = dict(modules())


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def room_of(module: str) -> str:
    """The room with the longest name that the module is in."""
    return max((room for room in ROOMS if within(module, room)), key=len)


def imports_of(path: Path) -> set[str]:
    """Modules that are imported anywhere in a file."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{name.name}" for name in node.names}
            found |= (inside & MODULES.keys()) or {node.module}
    return found


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}
OWN = [(m, i) for m, found in IMPORTS.items() for i in found if i.startswith("apollo_")]


def test_imports_point_one_way() -> None:
    upward = [
        f"{module} imports {imported}"
        for module, imported in OWN
        if ROOMS.index(room_of(imported)) > ROOMS.index(room_of(module))
    ]
    assert upward == []


def test_client_sidecar_and_trainer_do_not_import_each_other() -> None:
    met = [
        f"{module} imports {imported}"
        for module, imported in OWN
        for one, other in permutations(APART, 2)
        if within(module, one) and within(imported, other)
    ]
    assert met == []


@pytest.mark.parametrize("room", FRONTS)
def test_a_room_is_entered_by_its_front(room: str) -> None:
    past = [
        f"{module} imports {imported}"
        for module, imported in OWN
        if imported != room and within(imported, room) and not within(module, room)
    ]
    assert past == []


@pytest.mark.parametrize("room", UNKNOWN)
def test_a_room_does_not_know(room: str) -> None:
    known = [
        f"{module} imports {imported}"
        for module, found in IMPORTS.items()
        for imported in found
        if within(module, room) and any(within(imported, other) for other in UNKNOWN[room])
    ]
    assert known == []


def test_files_are_short() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: length for module, length in lengths.items() if length > LINES} == {}


def test_no_file_is_named_for_nothing() -> None:
    assert [module for module in MODULES if FORBIDDEN.search(module.rsplit(".", 1)[-1])] == []
