"""Every kind of model directory is given back as it was, by a real vLLM."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_client import ApolloClient
from tests import programs
from tests.model_directories import CASES, Case, make, round_trip
from tests.vllm.conftest import Stack
from tests.vllm.families import SMALL, Family

pytestmark = [pytest.mark.vllm, pytest.mark.long]
NEW_MOUNTS = 0x00020000  # CLONE_NEWNS, <linux/sched.h>


def read_only_model() -> None:
    """In a forked training server: the model directory takes no more writes, for it alone."""
    model = os.environ["READ_ONLY_MODEL"]
    assert ctypes.CDLL(None).unshare(NEW_MOUNTS) == 0
    for arguments in (
        ("--make-rprivate", "/"),
        ("--bind", model, model),
        ("-o", "remount,bind,ro", model),
    ):
        subprocess.run(["mount", *arguments], check=True)


class ServedByVllm(Stack):
    """vLLM on a directory, and the training server that is attached."""

    client: ApolloClient

    def __init__(self, folder: Path, case: Case, model: Path, **settings: Any):
        super().__init__(folder, "directory", Family("", dtype="bfloat16"), model)
        self._read_only = case.read_only
        self.environment |= {"READ_ONLY_MODEL": str(model)}
        self.environment |= {f"APOLLO_{name.upper()}": str(v) for name, v in settings.items()}
        self.start()

    def _start_server(self) -> None:
        # Not the export of it, which is served next.
        read_only = self._read_only and self.model.name == "model"
        before = read_only_model if read_only else None
        self.server = self._start("server", 1 - self._core, programs.SERVER, before=before)

    def scores(self, ids: list[int]) -> torch.Tensor:
        return self.engine_logprobs(ids)

    def close(self) -> None:
        self.client.close()
        self.end("server")
        self.end("vllm")


@pytest.mark.parametrize("name", CASES)
def test_a_directory_is_given_back_as_it_was(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = CASES[name]
    if case.read_only and os.geteuid() != 0:
        pytest.skip("only root may mount; run the tests as root, in a container for one")

    @contextmanager
    def serve(folder: Path, **settings: Any) -> Iterator[ServedByVllm]:
        stack = ServedByVllm(tmp_path_factory.mktemp("s"), case, folder, **settings)
        with closing(stack):
            stack.wait_attached()
            yield stack

    round_trip(case, make(tmp_path / "here" / "model", case, SMALL), serve)
