"""CheckpointService over a real channel: sync, and what is not built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from apollo_grpc.errors import FailedPrecondition, Unavailable, Unimplemented
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_grpc.v1 import training_pb2 as pb

UNARY = ("GetSnapshot", "ListSnapshots", "DeleteSnapshot")
STREAMS = ("CreateSnapshot", "RestoreSnapshot", "Undo", "Export")


def test_a_sync_brings_the_learned_weights_to_the_directory(
    caller: Any, model_folder: Path
) -> None:
    before = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    caller.train(epochs=3, optimizer=pb.OptimizerConfig(lr=1e-2))
    *progress, last = list(caller.checkpoints.Sync(cp.SyncRequest(), timeout=30))
    assert last.result.method == cp.SYNC_METHOD_RENAME
    assert last.result.weight_version == 3
    assert list(last.result.files_written) == ["model.safetensors"]
    assert [p.progress.bytes_done for p in progress][-1] == progress[-1].progress.bytes_total
    after = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert caller.status().last_sync.weight_version == 3

    *_, again = list(caller.checkpoints.Sync(cp.SyncRequest(), timeout=30))
    assert again.result.method == cp.SYNC_METHOD_UNCHANGED
    assert again.result.bytes_written == 0


def test_a_full_disk_is_told_and_the_old_files_are_kept(
    caller: Any, error_of: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import apollo_trainer.checkpoints.sync as sync_module

    def refuse(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    caller.train()
    before = (model_folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(sync_module, "flush_file", refuse)
    error = error_of(caller.checkpoints.Sync(cp.SyncRequest(), timeout=30))
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "DIRECTORY_NOT_WRITABLE"
    assert "No space left on device" in error.message
    assert str(model_folder) not in error.message
    assert (model_folder / "model.safetensors").read_bytes() == before


def test_without_an_engine_there_is_nothing_to_sync(start_server: Any, error_of: Any) -> None:
    error = error_of(start_server().checkpoints.Sync(cp.SyncRequest(), timeout=30))
    assert isinstance(error, Unavailable)


def test_a_request_id_is_refused(caller: Any, error_of: Any) -> None:
    error = error_of(caller.checkpoints.Sync(cp.SyncRequest(request_id="a"), timeout=30))
    assert error.metadata == {"field": "request_id"}


def test_every_unbuilt_call_says_so_in_one_sentence(start_server: Any, error_of: Any) -> None:
    checkpoints = start_server().checkpoints
    for method in (*UNARY, *STREAMS):
        call, request = getattr(checkpoints, method), getattr(cp, f"{method}Request")()
        error = error_of(call(request) if method in STREAMS else lambda c=call, r=request: c(r))
        assert isinstance(error, Unimplemented)
        assert (
            error.message == f"{method} is part of the contract and not built in this version yet."
        )
