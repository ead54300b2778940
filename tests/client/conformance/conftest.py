"""A training server that is attached to an engine, and a fake one, in this process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import pytest

from apollo_client.testing import FakeServer
from apollo_trainer.config import Settings
from tests.engine_double import EngineDouble
from tests.services.conftest import Caller, ServerThread


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="apollo-") as made:
        yield Path(made)


@pytest.fixture(scope="package")
def caller(tiny_model: Path) -> Iterator[Caller]:
    """A caller of one training server, which is attached to an engine, for all tests here."""
    with tempfile.TemporaryDirectory(prefix="apollo-") as made, pytest.MonkeyPatch.context() as to:
        sidecar = f"unix:{made}/sidecar.sock"
        engine = EngineDouble(Path(copytree(tiny_model, f"{made}/model")), sidecar)
        settings = {"rank": 8, "state_dir": Path(made), "sidecar": sidecar, "probe_weights": False}
        server = ServerThread(Settings(address=f"unix:{made}/training.sock", **settings), to)
        server.caller.wait_attached()
        yield server.caller
        server.stop()
        engine.stop()


@pytest.fixture(scope="package")
def fake() -> Iterator[FakeServer]:
    """A server that keeps every promise, and has no model."""
    with FakeServer() as made:
        yield made
