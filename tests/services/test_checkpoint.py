"""CheckpointService over a real channel: the model directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apollo_grpc.errors import FailedPrecondition, Resource, Unavailable
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.disk.file_ops import FileOps
from tests.waiting import HANG


def test_a_sync_brings_the_learned_weights_to_the_directory(
    caller: Any, model_folder: Path
) -> None:
    before = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    caller.train(epochs=3, optimizer=pb.OptimizerConfig(lr=1e-2))
    *progress, last = list(caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG))
    assert last.result.method == cp.SYNC_METHOD_EXCHANGE
    assert last.result.weight_version == 3
    assert list(last.result.files_written) == ["model.safetensors"]
    assert [p.progress.bytes_done for p in progress][-1] == progress[-1].progress.bytes_total
    after = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert caller.status().last_sync.weight_version == 3

    *_, again = list(caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG))
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
    error = error_of(caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG))
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "DIRECTORY_NOT_WRITABLE"
    assert "No space left on device" in error.message
    assert str(model_folder) not in error.message
    assert (model_folder / "model.safetensors").read_bytes() == before


def test_without_an_engine_there_is_nothing_to_sync(start_server: Any, error_of: Any) -> None:
    error = error_of(start_server().checkpoints.Sync(cp.SyncRequest(), timeout=HANG))
    assert isinstance(error, Unavailable)


def test_a_request_id_attaches_to_what_the_first_call_began(caller: Any, error_of: Any) -> None:
    caller.train()
    asked = cp.SyncRequest(request_id="a")
    *_, first = caller.checkpoints.Sync(asked, timeout=HANG)
    *_, again = caller.checkpoints.Sync(asked, timeout=HANG)
    assert again.result == first.result
    assert again.result.method == cp.SYNC_METHOD_EXCHANGE
    other = cp.SyncRequest(request_id="a", method=cp.SYNC_METHOD_IN_PLACE)
    assert error_of(caller.checkpoints.Sync(other, timeout=HANG)).reason == "REQUEST_ID_TAKEN"


def test_a_verification_reads_what_the_sync_wrote_and_tells_what_was_damaged(
    caller: Any, error_of: Any, model_folder: Path
) -> None:
    never = error_of(caller.checkpoints.Verify(cp.VerifyRequest(), timeout=HANG))
    assert never.reason == "NEVER_SYNCED"
    caller.train(optimizer=pb.OptimizerConfig(lr=1e-2))
    list(caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG))
    asked = cp.VerifyRequest(full=True, live=True)
    *_, sound = list(caller.checkpoints.Verify(asked, timeout=HANG))
    assert not sound.result.differences
    assert sound.result.bytes_read > 0
    caller.train(optimizer=pb.OptimizerConfig(lr=1e-2))
    *_, behind = list(caller.checkpoints.Verify(cp.VerifyRequest(live=True), timeout=HANG))
    assert "sync to write them" in behind.result.differences[0].description
    with (model_folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    *_, damaged = list(caller.checkpoints.Verify(cp.VerifyRequest(full=True), timeout=HANG))
    assert damaged.result.differences[-1].tensor
    refused = error_of(caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG))
    assert refused.reason == "DIRECTORY_EDITED"


def test_a_sync_in_place_keeps_the_file_itself(caller: Any, model_folder: Path) -> None:
    shard = model_folder / "model.safetensors"
    before = shard.stat().st_ino
    caller.train(optimizer=pb.OptimizerConfig(lr=1e-2))
    request = cp.SyncRequest(method=cp.SYNC_METHOD_IN_PLACE)
    *_, last = list(caller.checkpoints.Sync(request, timeout=HANG))
    assert last.result.method == cp.SYNC_METHOD_IN_PLACE
    assert shard.stat().st_ino == before
    *_, sound = list(
        caller.checkpoints.Verify(cp.VerifyRequest(full=True, live=True), timeout=HANG)
    )
    assert not sound.result.differences


def test_a_method_that_cannot_be_asked_for_is_refused(caller: Any, error_of: Any) -> None:
    request = cp.SyncRequest(method=cp.SYNC_METHOD_UNCHANGED)
    assert error_of(caller.checkpoints.Sync(request, timeout=HANG)).violations[0].field == "method"


def test_a_directory_of_links_is_adopted_and_the_copy_is_whole(
    caller: Any, error_of: Any, model_folder: Path, tmp_path: Path
) -> None:
    shard, blob = model_folder / "model.safetensors", tmp_path / "blob"
    shard.rename(blob)
    shard.symlink_to(blob)
    refused = error_of(caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG))
    assert refused.reason == "SHARD_IS_LINKED"
    assert "apollo checkpoint adopt" in refused.message
    target = tmp_path / "mine"
    request = cp.AdoptRequest(directory=str(target))
    *_, last = list(caller.checkpoints.Adopt(request, timeout=HANG))
    assert last.result.files == len(list(target.iterdir()))
    copy = target / "model.safetensors"
    assert not copy.is_symlink()
    assert copy.read_bytes() == blob.read_bytes()
    again = error_of(caller.checkpoints.Adopt(request, timeout=HANG))
    assert again.reason == "FOLDER_EXISTS"
    assert again.resource == Resource("directory", str(target))
    relative = cp.AdoptRequest(directory="mine")
    assert error_of(caller.checkpoints.Adopt(relative, timeout=HANG)).violations


def test_what_a_sync_would_refuse_is_told_when_attached(
    start_engine: Any, start_server: Any, model_folder: Path, tmp_path: Path
) -> None:
    shard, blob = model_folder / "model.safetensors", tmp_path / "blob"
    shard.rename(blob)
    shard.symlink_to(blob)
    start_engine()
    server = start_server()
    server.wait_attached()
    detail = server.status().attachment_detail
    assert "A sync would be refused: model.safetensors is a link" in detail
    assert "apollo checkpoint export" in detail
    server.train()
    *_, last = list(server.checkpoints.Export(cp.ExportRequest(directory=f"{tmp_path}/out")))
    assert last.result.weight_version == 1


def test_a_link_that_leads_to_another_model_by_now_is_not_followed(
    start_engine: Any, start_server: Any, model_folder: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "v1", tmp_path / "v2"
    model_folder.rename(first)
    shutil.copytree(first, second)
    model_folder.symlink_to("v1")
    engine, server = start_engine(), start_server()
    server.wait_attached()
    server.train(optimizer=pb.OptimizerConfig(lr=1e-2))
    model_folder.unlink()
    model_folder.symlink_to("v2")
    before = (second / "model.safetensors").read_bytes()
    *_, last = list(server.checkpoints.Sync(cp.SyncRequest(), timeout=HANG))
    assert last.result.tensors_changed > 0
    assert (second / "model.safetensors").read_bytes() == before
    values = engine.model.values()
    for name, tensor in load_file(first / "model.safetensors").items():
        assert torch.equal(tensor, values[name])
    list(server.checkpoints.Export(cp.ExportRequest(directory=f"{tmp_path}/out"), timeout=HANG))


def test_a_model_that_was_put_in_the_place_of_the_served_one_is_not_written_over(
    caller: Any, error_of: Any, model_folder: Path, tmp_path: Path, start_server: Any
) -> None:
    caller.train(optimizer=pb.OptimizerConfig(lr=1e-2))
    shard = model_folder / "model.safetensors"
    newer = {name: t * 2 for name, t in load_file(shard).items()}
    save_file(newer, tmp_path / "newer.safetensors", {"format": "pt"})
    (tmp_path / "newer.safetensors").rename(shard)
    before = shard.read_bytes()
    refused = error_of(caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG))
    assert refused.reason == "DIRECTORY_EDITED"
    assert "apollo checkpoint export" in refused.message
    assert shard.read_bytes() == before
    caller.stop()
    # What it says to do for who wants that.
    again = start_server()
    again.wait_attached()
    *_, last = list(again.checkpoints.Sync(cp.SyncRequest(), timeout=HANG))
    assert last.result.method == cp.SYNC_METHOD_EXCHANGE


def test_a_float32_directory_that_is_served_in_bfloat16_stays_one(
    start_engine: Any, start_server: Any, model_folder: Path
) -> None:
    start_engine(dtype=torch.bfloat16)
    server, shard = start_server(), model_folder / "model.safetensors"
    server.wait_attached()
    before, found = shard.read_bytes(), shard.stat()
    *_, last = list(server.checkpoints.Sync(cp.SyncRequest(), timeout=HANG))
    assert last.result.method == cp.SYNC_METHOD_UNCHANGED
    assert (shard.read_bytes(), shard.stat().st_ino) == (before, found.st_ino)
    old = load_file(shard)
    server.train(optimizer=pb.OptimizerConfig(lr=1e-3))
    *_, last = list(server.checkpoints.Sync(cp.SyncRequest(), timeout=HANG))
    assert last.result.tensors_changed > 0
    new = load_file(shard)
    assert {t.dtype for t in new.values()} == {torch.float32}
    for name, values in new.items():
        same = values.to(torch.bfloat16) == old[name].to(torch.bfloat16)
        assert torch.equal(values[same], old[name][same])
        assert torch.equal(values[~same], values[~same].to(torch.bfloat16).float())
    *_, sound = list(
        server.checkpoints.Verify(cp.VerifyRequest(full=True, live=True), timeout=HANG)
    )
    assert not sound.result.differences
