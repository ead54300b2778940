"""What several rooms share: a tiny model directory, engines without vLLM, short socket paths."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from apollo_grpc.errors import printable
from tests.waiting import wait_until

# Read when torch is imported. Threads that wait for each other by spinning take the cores from all
# other workers: the same tests took a third more of both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Of the tests of a real vLLM, those that neither share one nor the process that forks them.
ALONE = ("test_doctor",)
# These compile the same loops.
COMPILING = ("test_frames", "test_ulp_loops", "test_delta_file", "test_snapshot_store")
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None)
hypothesis.settings.load_profile("seeded")


class ByFile(LoadScopeScheduling):
    """A file's tests stay together, and so do those that share a vLLM, or compiled loops."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.partition("::")[0])
        if shares_vllm(file):
            return "one vLLM"
        return "compiled loops" if file.stem in COMPILING else str(file)


def shares_vllm(file: Path) -> bool:
    return file.parent.name == "vllm" and file.stem not in ALONE


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that start a vLLM come first: the others fill what time they leave."""
    items.sort(key=lambda item: (item.path.parent.name != "vllm", not shares_vllm(item.path)))


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Iterator[None]:
    """Some tests log names that are no UTF-8: a report that has one would end its worker."""
    return spelt_out((yield))


def spelt_out(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {spelt_out(key): spelt_out(each) for key, each in value.items()}
    return type(value)(map(spelt_out, value)) if isinstance(value, list | tuple) else value


def pytest_sessionstart() -> None:
    """Ctrl-C reaches what tests start, also where a shell has made all of it ignore that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Takes the imports of all tests out of the garbage collector's sight, as the server does.

    Otherwise each engine that a test ends stops every thread for some 0.6 s.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def log_of_its_own() -> Iterator[None]:
    """A server that a test has in its own process logs no longer than that."""
    level = logging.getLogger().level
    yield
    if logs := sys.modules.get("apollo_trainer.logs"):
        logs.end(level)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of some 20,000 parameters in fp32, tied, with the byte tokenizer. Read only."""
    from transformers import Qwen3Config

    from examples.byte_model import write_model

    config = Qwen3Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return write_model(tmp_path_factory.mktemp("tiny") / "model", config, seed=7)


@pytest.fixture
def model_folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may write to."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """A private folder with a path short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="apollo-") as folder:
        yield Path(folder)


@pytest.fixture
def sidecar_address(state_dir: Path) -> str:
    return f"unix:{state_dir}/sidecar.sock"


@pytest.fixture
def start_engine(model_folder: Path, sidecar_address: str) -> Iterator[Callable[..., Any]]:
    """Starts an `EngineDouble` on the model folder; all are stopped at the end."""
    import torch

    from tests.engine_double import EngineDouble

    torch.set_num_threads(1)
    started: list[EngineDouble] = []

    def start(**options: Any) -> EngineDouble:
        started.append(EngineDouble(model_folder, sidecar_address, **options))
        return started[-1]

    yield start
    for engine in started:
        engine.stop()


@pytest.fixture
def wait() -> Callable[[Callable[[], Any], str], None]:
    """Polls until a condition holds; fails with the name of what did not come."""
    return wait_until
