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
from apollo_trainer.checkpoints.file_ops import FileOps

UNARY = ("GetSnapshot", "ListSnapshots", "DeleteSnapshot")
STREAMS = ("CreateSnapshot", "RestoreSnapshot", "Undo", "Export")


def test_a_sync_brings_the_learned_weights_to_the_directory(
    caller: Any, model_folder: Path
) -> None:
    before = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    caller.train(epochs=3, optimizer=pb.OptimizerConfig(lr=1e-2))
    *progress, last = list(caller.checkpoints.Sync(cp.SyncRequest(), timeout=30))
    assert last.result.method == cp.SYNC_METHOD_EXCHANGE
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
    def refuse(ops: FileOps, file: int) -> None:
        raise OSError(28, "No space left on device")

    caller.train()
    before = (model_folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(FileOps, "fsync", refuse)
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


def test_a_verification_reads_what_the_sync_wrote_and_tells_what_was_damaged(
    caller: Any, error_of: Any, model_folder: Path
) -> None:
    never = error_of(caller.checkpoints.Verify(cp.VerifyRequest(), timeout=30))
    assert never.reason == "NEVER_SYNCED"
    caller.train(optimizer=pb.OptimizerConfig(lr=1e-2))
    list(caller.checkpoints.Sync(cp.SyncRequest(), timeout=30))
    asked = cp.VerifyRequest(full=True, live=True)
    *_, sound = list(caller.checkpoints.Verify(asked, timeout=30))
    assert not sound.result.differences
    assert sound.result.bytes_read > 0
    caller.train(optimizer=pb.OptimizerConfig(lr=1e-2))
    *_, behind = list(caller.checkpoints.Verify(cp.VerifyRequest(live=True), timeout=30))
    assert "sync to write them" in behind.result.differences[0].description
    with (model_folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    *_, damaged = list(caller.checkpoints.Verify(cp.VerifyRequest(full=True), timeout=30))
    assert damaged.result.differences[-1].tensor
    refused = error_of(caller.checkpoints.Sync(cp.SyncRequest(), timeout=30))
    assert refused.reason == "DIRECTORY_EDITED"


def test_a_sync_in_place_keeps_the_file_itself(caller: Any, model_folder: Path) -> None:
    shard = model_folder / "model.safetensors"
    before = shard.stat().st_ino
    caller.train(optimizer=pb.OptimizerConfig(lr=1e-2))
    request = cp.SyncRequest(method=cp.SYNC_METHOD_IN_PLACE)
    *_, last = list(caller.checkpoints.Sync(request, timeout=30))
    assert last.result.method == cp.SYNC_METHOD_IN_PLACE
    assert shard.stat().st_ino == before
    *_, sound = list(caller.checkpoints.Verify(cp.VerifyRequest(full=True, live=True), timeout=30))
    assert not sound.result.differences


def test_a_method_that_cannot_be_asked_for_is_refused(caller: Any, error_of: Any) -> None:
    request = cp.SyncRequest(method=cp.SYNC_METHOD_RENAME)
    assert error_of(caller.checkpoints.Sync(request, timeout=30)).violations[0].field == "method"


def test_a_directory_of_links_is_adopted_and_the_copy_is_whole(
    caller: Any, error_of: Any, model_folder: Path, tmp_path: Path
) -> None:
    shard, blob = model_folder / "model.safetensors", tmp_path / "blob"
    shard.rename(blob)
    shard.symlink_to(blob)
    refused = error_of(caller.checkpoints.Sync(cp.SyncRequest(), timeout=30))
    assert refused.reason == "SHARD_IS_LINKED"
    assert "apollo checkpoint adopt" in refused.message
    target = tmp_path / "mine"
    request = cp.AdoptRequest(directory=str(target))
    *_, last = list(caller.checkpoints.Adopt(request, timeout=30))
    assert last.result.files == len(list(target.iterdir()))
    copy = target / "model.safetensors"
    assert not copy.is_symlink()
    assert copy.read_bytes() == blob.read_bytes()
    again = error_of(caller.checkpoints.Adopt(request, timeout=30))
    assert again.reason == "FOLDER_EXISTS"
    relative = cp.AdoptRequest(directory="mine")
    assert error_of(caller.checkpoints.Adopt(relative, timeout=30)).violations
