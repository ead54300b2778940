"""`apollo-training-server memory`: what training needs of a GPU, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apollo_trainer.main import main
from apollo_trainer.memory_command import BESIDE_BYTES
from apollo_trainer.optim import Apollo
from apollo_trainer.training.twin import twin_of_directory


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["memory", *arguments])
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    told: dict[str, Any] = json.loads(out)
    return told


def test_weights_and_state_are_those_of_the_model_that_vllm_serves_on_a_gpu(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APOLLO_RANK", "8")
    told = as_json(capsys, str(tiny_model), "--step", "20+10")
    twin = twin_of_directory(tiny_model)
    by_name = {
        name: param.new_empty(param.shape, device="cpu") for name, param in twin.named_parameters()
    }
    assert told["step"] == "20 + 10"
    assert told["weights_bytes"] == 2 * sum(p.numel() for p in by_name.values())
    assert told["state_bytes"] == Apollo(by_name.items(), rank=8).state_size_bytes()


@pytest.mark.parametrize("gigabytes", [8.0, 24.0, 141.0])
def test_what_vllm_may_take_leaves_what_training_needs_and_wastes_little(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], gigabytes: float
) -> None:
    told = as_json(capsys, str(tiny_model), "--gpu-memory-gb", str(gigabytes))
    assert told["total_bytes"] == gigabytes * 1e9
    needed = told["state_bytes"] + told["step_bytes"] + BESIDE_BYTES
    share = told["gpu_memory_utilization"]
    assert share * told["total_bytes"] + needed <= told["total_bytes"]
    assert (share + 0.011) * told["total_bytes"] + needed > told["total_bytes"]


def test_a_gpu_that_is_too_small_is_named(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, str(tiny_model), "--gpu-memory-gb", "4")
    assert status == 0
    assert "4.0 GB are too little for weights, state and step" in out
    assert as_json(capsys, str(tiny_model), "--gpu-memory-gb", "4")["gpu_memory_utilization"] == 0


def test_the_lines_name_weights_state_step_and_the_option_of_vllms(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, str(tiny_model), "--gpu-memory-gb", "24", "--step", "4x30+10")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert list(lines) == ["weights", "state", "step", "card"]
    assert lines["step"].endswith("for 4 samples of 30 + 10 tokens")
    assert lines["card"].startswith("--gpu-memory-utilization 0.8")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--step", "17"), 2, "is no length of a step, such as 1800+200"),
        (("--step", "1800+200", "--rank", "8"), 2, "unrecognized arguments"),
    ],
)
def test_wrong_arguments_are_refused(
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    status: int,
    words: str,
) -> None:
    ended, _, err = run(capsys, str(tiny_model), *arguments)
    assert ended == status
    assert words in err


def test_a_folder_without_a_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, str(tmp_path))
    assert (status, "transformers cannot build the model" in err) == (1, True)
