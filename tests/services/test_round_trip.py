"""Every kind of model directory is given back as it was, beside an engine without vLLM."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_client import ApolloClient
from apollo_trainer.config import Settings
from tests.checkpoints.private_mounts import mount, with_private_mounts
from tests.engine_double import EngineDouble
from tests.model_directories import CASES, INDEX, SERVED, Case, make, round_trip
from tests.services.conftest import ServerThread


class ServedByDouble:
    """An engine double and a training server in this process."""

    def __init__(self, folder: Path, state: Path, patch: pytest.MonkeyPatch, **settings: Any):
        sidecar, address = (f"unix:{state}/{name}.sock" for name in ("sidecar", "training"))
        with transformers_loads(folder):
            self._engine = EngineDouble(folder, sidecar, dtype=SERVED)
        chosen = {"rank": 8, "state_dir": state, "sidecar": sidecar, "address": address}
        chosen |= {"probe_weights": False} | settings
        self._server = ServerThread(Settings(**chosen), patch)
        self._server.caller.wait_attached()
        self.client = ApolloClient(address)

    def scores(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor(self._engine.model.score(ids))

    def close(self) -> None:
        self.client.close()
        self._server.stop()
        self._engine.stop()


@contextmanager
def transformers_loads(folder: Path) -> Iterator[None]:
    """Without metadata in its index transformers loads no directory, as vLLM does."""
    index = folder / INDEX
    content, found = (index.read_bytes(), index.stat()) if index.exists() else (b"{}", None)
    if found and "metadata" not in json.loads(content):
        index.write_text(json.dumps(json.loads(content) | {"metadata": {}}))
    yield
    if found:
        index.write_bytes(content)
        os.utime(index, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("name", CASES)
def test_a_directory_is_given_back_as_it_was(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def serve(folder: Path, **settings: Any) -> Iterator[ServedByDouble]:
        with (
            tempfile.TemporaryDirectory(prefix="apollo-") as state,
            closing(ServedByDouble(folder, Path(state), monkeypatch, **settings)) as served,
        ):
            yield served

    def run(case: Case) -> None:
        torch.set_num_threads(1)
        folder = make(tmp_path / "here" / "model", case)
        if case.read_only:
            mount("--bind", folder, folder)
            mount("-o", "remount,bind,ro", folder)
        round_trip(case, folder, serve)

    case = CASES[name]
    in_private: Callable[[Case], None] = with_private_mounts(run)
    (in_private if case.read_only else run)(case)
