"""The Apollo state on disk: it comes back as it was, or is refused and left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.checkpoints.apollo_state import load_state, read_state, save_state
from apollo_trainer.checkpoints.disk.digests import file_digest
from apollo_trainer.checkpoints.host_memory import HostBuffers, empty_like_host
from apollo_trainer.optim import Apollo
from apollo_trainer.weights.checkpoint_reader import same_bytes
from tests import programs

DESCRIPTION: dict[str, Any] = {"step_count": 7, "names": ["a", "é"], "limit": None, "lr": 1e-5}
# Saves once, then again with room for 4 KB only, and says which error that was.
SAVE_WITHOUT_ROOM = """
import resource, signal, sys
from pathlib import Path
import torch
from apollo_trainer.checkpoints.apollo_state import save_state

path = Path(sys.argv[1])
save_state(path, {"m": torch.zeros(4096)}, {"step_count": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_state(path, {"m": torch.ones(4096)}, {"step_count": 2})
except OSError as error:
    print(error.strerror)
"""


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "m.w": torch.randn(3, 4),
        "v.w": torch.tensor([math.nan, -0.0, math.inf, 1e-42]),
        "step.w": torch.tensor(7),
        "low.w": torch.arange(-3, 3, dtype=torch.int16),
    }


def test_the_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "models" / "m" / "apollo_state.safetensors"
    size = save_state(path, state(), DESCRIPTION)
    loaded = load_state(path)
    assert loaded is not None
    tensors, description = loaded
    assert description == DESCRIPTION
    assert size == path.stat().st_size
    assert tensors.keys() == state().keys()
    for name, tensor in state().items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert tensors[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_a_tensor_that_is_not_contiguous_is_saved_by_value(tmp_path: Path) -> None:
    path, tensor = tmp_path / "state", torch.arange(6.0).reshape(2, 3).T
    save_state(path, {"m": tensor}, {})
    loaded = load_state(path)
    assert loaded is not None
    assert torch.equal(loaded[0]["m"], tensor)


def test_an_optimizer_goes_on_from_its_file_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    def parameter() -> torch.nn.Parameter:
        torch.manual_seed(2)
        return torch.nn.Parameter(torch.randn(16, 8))

    def train(weight: torch.nn.Parameter, optimizer: Apollo, first: int) -> None:
        for number in range(first, first + 3):
            torch.manual_seed(number)
            weight.grad = torch.randn(16, 8)
            optimizer.step()

    straight, stopped = parameter(), parameter()
    one = Apollo([("w", straight)], lr=0.1, rank=4)
    two = Apollo([("w", stopped)], lr=0.1, rank=4)
    train(straight, one, 0)
    train(stopped, two, 0)
    save_state(tmp_path / "state", *two.named_state())
    loaded = load_state(tmp_path / "state")
    assert loaded is not None
    three = Apollo([("w", stopped)], rank=4)
    three.load_named_state(*loaded)
    train(straight, one, 3)
    train(stopped, three, 3)
    assert torch.equal(straight, stopped)
    assert three.step_count == 6


def test_no_file_is_no_state(tmp_path: Path) -> None:
    assert load_state(tmp_path / "none") is None


def test_a_state_that_is_read_into_buffers_is_the_state(tmp_path: Path) -> None:
    path, buffers = tmp_path / "state", HostBuffers()
    save_state(path, state(), DESCRIPTION)
    tensors, description = read_state(path, file_digest(path), buffers.take)
    assert description == DESCRIPTION
    assert tensors.keys() == state().keys()
    assert all(same_bytes(tensors[name], tensor) for name, tensor in state().items())
    # They may be written to: the file stays as it is.
    for tensor in tensors.values():
        tensor.zero_()
    loaded = load_state(path)
    assert loaded is not None
    assert all(same_bytes(loaded[0][name], tensor) for name, tensor in state().items())


@pytest.mark.parametrize("at", [3, 40, -1])
def test_a_state_with_another_byte_is_not_read(tmp_path: Path, at: int) -> None:
    path = tmp_path / "state"
    save_state(path, state(), DESCRIPTION)
    digest, content = file_digest(path), bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"header|not what was written"):
        read_state(path, digest, empty_like_host)


def test_others_cannot_enter_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "models" / "state"
    save_state(path, state(), {})
    assert path.parent.stat().st_mode & 0o777 == 0o700


def truncated(path: Path) -> None:
    save_state(path, state(), DESCRIPTION)
    path.write_bytes(path.read_bytes()[:-5])


def of_another_program(path: Path) -> None:
    save_file(state(), path, metadata={"format": "pt"})


def without_metadata(path: Path) -> None:
    save_file(state(), path)


def not_json(path: Path) -> None:
    save_file(state(), path, metadata={"format": "apollo-state-1", "description": "{"})


@pytest.mark.parametrize(
    "write",
    [
        truncated,
        of_another_program,
        without_metadata,
        not_json,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 4096),
        lambda path: path.mkdir(),
    ],
    ids=["truncated", "foreign", "bare", "not json", "empty", "garbage", "a folder"],
)
def test_an_unreadable_state_is_refused_and_left_as_it_is(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    path = tmp_path / "state"
    write(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(FailedPrecondition, match="left as it is") as caught:
        load_state(path)
    assert caught.value.reason == "STATE_UNREADABLE"
    assert (path.read_bytes() if path.is_file() else None) == before


def test_nan_in_the_description_is_refused_before_the_disk_is_touched(tmp_path: Path) -> None:
    save_state(tmp_path / "state", state(), DESCRIPTION)
    with pytest.raises(ValueError, match="JSON"):
        save_state(tmp_path / "state", state(), {"lr": math.nan})
    loaded = load_state(tmp_path / "state")
    assert loaded is not None
    assert loaded[1] == DESCRIPTION


def test_a_full_disk_is_an_oserror_that_keeps_the_old_state(tmp_path: Path) -> None:
    path = tmp_path / "state"
    _, told = programs.run(SAVE_WITHOUT_ROOM, path)
    assert told.startswith("File too large\n"), told
    loaded = load_state(path)
    assert loaded is not None
    assert loaded[1] == {"step_count": 1}
    assert list(tmp_path.iterdir()) == [path]
