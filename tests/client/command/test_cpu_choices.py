"""What `apollo up` tells vLLM on a CPU where the user did not."""

from __future__ import annotations

from pathlib import Path

import pytest

from apollo_client.command import cpu_choices
from apollo_client.command.cpu_choices import GIB, KV_CACHE, eager, kv_cache
from apollo_client.command.free_memory import FreeMemory
from apollo_client.command.up import vllm_child
from apollo_grpc.errors import ResourceExhausted
from tests.command_line import apollo


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KV_CACHE, raising=False)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Sets how much memory is free."""

    def set_to(gib: float) -> None:
        found = FreeMemory(int(gib * GIB), "here")
        monkeypatch.setattr(cpu_choices, "free_memory", lambda: found)

    return set_to


def model_of(folder: Path, gib: int) -> Path:
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(gib * GIB)
    return folder


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([], True),
        (["--max-model-len", "1024", "--port=1"], True),
        (["--enforce-eager"], False),
        (["--no-enforce-eager"], False),
        (["--no_enforce_eager"], False),
        (["-O3"], False),
        (["-O", "1"], False),
        (["-O.mode=3"], False),
        (["-cc", "{}"], False),
        (["--compilation-config.mode", "0"], False),
        (["--compilation_config={}"], False),
        (["--optimization-level=2"], False),
    ],
)
def test_it_is_eager_unless_the_user_spoke_of_compilation(said: list[str], expected: bool) -> None:
    assert eager(said) == (["--enforce-eager"] if expected else [])
    command = vllm_child(Path("/m"), "127.0.0.1", 8000, said, "unix:/s").command
    assert ("--enforce-eager" in command) == (expected or "--enforce-eager" in said)


@pytest.mark.parametrize("option", [["--config", "{}"], ["--config={}"]])
def test_what_a_config_file_of_vllms_says_counts_too(
    tmp_path: Path, option: list[str], free
) -> None:
    free(10)
    path = tmp_path / "vllm.yaml"
    path.write_text("max-model-len: 64\nenforce_eager: false\ngpu-memory-utilization: 0.5\n")
    said = [each.format(path) for each in option]
    assert eager(said) == []
    assert kv_cache(model_of(tmp_path, 1), said) is None


@pytest.mark.parametrize(("gib", "expected"), [(10, 2), (7.1, 1), (24, 4)])
def test_the_kv_cache_leaves_room_for_weights_and_training_and_is_no_larger_than_a_start_bears(
    tmp_path: Path, free, gib: float, expected: int
) -> None:
    free(gib)
    found = kv_cache(model_of(tmp_path, 1), [])
    assert found and found.gib == expected


def test_the_users_own_size_counts(tmp_path: Path, free, monkeypatch: pytest.MonkeyPatch) -> None:
    free(0.1)
    model = model_of(tmp_path, 1)
    for said in (["--kv-cache-memory-bytes", "1"], ["--gpu_memory_utilization=0.3"]):
        assert kv_cache(model, said) is None
    monkeypatch.setenv(KV_CACHE, "2")
    assert kv_cache(model, []) is None


def test_too_little_memory_is_told_with_the_way_to_try_all_the_same(tmp_path: Path, free) -> None:
    free(6.9)
    with pytest.raises(ResourceExhausted, match=f"7.4 GB are free here.*{KV_CACHE}=1") as caught:
        kv_cache(model_of(tmp_path, 1), [])
    assert caught.value.reason == "MEMORY_TOO_LITTLE"


def test_a_gpu_is_told_nothing(tmp_path: Path, free, monkeypatch: pytest.MonkeyPatch) -> None:
    free(0.1)
    monkeypatch.setattr(cpu_choices, "engine_on_cpu", lambda: False)
    assert (eager([]), kv_cache(tmp_path, [])) == ([], None)


def test_up_starts_nothing_where_memory_is_too_little(tmp_path: Path, free, tiny_model) -> None:
    free(1)
    done = apollo("up", str(tiny_model), env={"APOLLO_STATE_DIR": str(tmp_path / "state")})
    assert (done.returncode, done.stdout) == (1, "")
    assert "1.1 GB are free here" in done.stderr and "MEMORY_TOO_LITTLE" in done.stderr
