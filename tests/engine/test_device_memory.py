"""The memory that is told is the device's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apollo_trainer.engine import device_memory as module
from apollo_trainer.engine.device_memory import device_memory


def test_a_cpus_is_the_machines_and_its_page_cache_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:  8 kB\nMemFree:  1 kB\nMemAvailable:   4096 kB\nCached: 9 kB\n")
    monkeypatch.setattr(module, "MEMINFO", told)
    name, used, total = device_memory(torch.device("cpu"))
    assert (name, total - used) == ("cpu", 4 * 2**20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_is_told_by_its_driver() -> None:
    before = device_memory(torch.device("cuda"))
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    name, used, total = device_memory(held.device)
    assert name == before[0] and name.startswith("cuda:")
    assert used >= before[1] + held.nbytes and total == before[2]


def test_the_status_tells_it(attached: object) -> None:
    _, trainer = attached  # type: ignore[misc]
    memory = trainer.board.snapshot().device_memory
    assert memory.device == "cpu"
    assert 0 < memory.used_bytes < memory.total_bytes
