"""What a user is told when a real file system refuses, and what goes on beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from apollo_client import ApolloClient
from apollo_grpc.errors import FailedPrecondition, Unavailable
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_grpc.v1 import training_pb2 as pb
from tests.checkpoints.private_mounts import fill, mount, read_only, tmpfs, with_private_mounts
from tests.server_process import served
from tests.waiting import HANG

FAST = pb.OptimizerConfig(lr=1e-2)
SAMPLE = {"context_ids": [60, 61, 62], "continuation_ids": [70, 71, 72, 73]}


@pytest.fixture
def on_small_disk(
    tiny_model: Path, model_folder: Path, start_engine: Any, start_server: Any
) -> Any:
    """Starts all on a disk of 4 MB that holds the model directory; call it within the test."""

    def start() -> Any:
        tmpfs(model_folder.parent, "4M")
        shutil.copytree(tiny_model, model_folder)
        engine, caller = start_engine(), start_server()
        caller.wait_attached()
        caller.train(optimizer=FAST)
        return engine, caller

    return start


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], values) for name, values in b.items())


def assert_told(caller: Any, error_of: Any, of_sync: str, of_snapshot: str) -> None:
    """What both say, and the way that keeps what was learned; training goes on."""
    sync = caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG)
    snapshot = caller.checkpoints.CreateSnapshot(cp.CreateSnapshotRequest(name="a"), timeout=HANG)
    for call, words in ((sync, of_sync), (snapshot, of_snapshot)):
        error = error_of(call)
        assert isinstance(error, FailedPrecondition)
        assert error.reason == "DIRECTORY_NOT_WRITABLE"
        assert words in error.message
        assert "apollo checkpoint export" in error.message
    assert caller.train(optimizer=FAST)[-1].finished.state == pb.RUN_STATE_SUCCEEDED


def assert_all_works(engine: Any, caller: Any, folder: Path) -> None:
    *_, last = caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG)
    assert last.result.method == cp.SYNC_METHOD_EXCHANGE
    assert same(engine.model.values(), loaded(folder))
    *_, last = caller.checkpoints.CreateSnapshot(cp.CreateSnapshotRequest(name="a"), timeout=HANG)
    assert last.snapshot.name == "a"


@with_private_mounts
def test_a_full_disk_is_told_and_the_old_weights_load(
    on_small_disk: Any, model_folder: Path, error_of: Any
) -> None:
    engine, caller = on_small_disk()
    before = loaded(model_folder)
    filler = fill(model_folder.parent, 0)
    full = "No space left on device"
    assert_told(caller, error_of, full, full)
    assert "MB left. Make room there" in caller.status().attachment_detail
    assert same(before, loaded(model_folder))
    filler.unlink()
    assert_all_works(engine, caller, model_folder)
    assert "would be refused" not in caller.status().attachment_detail


@with_private_mounts
def test_a_read_only_disk_is_told_and_training_goes_on(
    on_small_disk: Any, model_folder: Path, error_of: Any
) -> None:
    engine, caller = on_small_disk()
    before = loaded(model_folder)
    read_only(model_folder.parent)
    assert_told(caller, error_of, "Nothing can be written to", "Read-only file system")
    assert "Nothing can be written to" in caller.status().attachment_detail
    assert same(before, loaded(model_folder))
    mount("-o", "remount,rw", model_folder.parent)
    assert_all_works(engine, caller, model_folder)


@with_private_mounts
def test_a_read_only_directory_is_told_when_attached_and_an_export_keeps_what_was_learned(
    start_engine: Any, start_server: Any, model_folder: Path, tmp_path: Path
) -> None:
    mount("--bind", model_folder, model_folder)
    mount("-o", "remount,bind,ro", model_folder)
    engine, caller = start_engine(), start_server()
    caller.wait_attached()
    detail = caller.status().attachment_detail
    assert f"A sync would be refused: Nothing can be written to {model_folder}" in detail
    assert caller.train(optimizer=FAST)[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    list(caller.checkpoints.Export(cp.ExportRequest(directory=f"{tmp_path}/out"), timeout=HANG))
    assert same(loaded(tmp_path / "out"), engine.model.values())


def test_a_state_folder_elsewhere_is_used_for_all(
    start_engine: Any, start_server: Any, model_folder: Path, tmp_path: Path
) -> None:
    engine, elsewhere = start_engine(), tmp_path / "states" / "of-models"
    caller = start_server(checkpoint_dir=elsewhere)
    caller.wait_attached()
    caller.train(optimizer=FAST)
    assert_all_works(engine, caller, model_folder)
    *_, sound = caller.checkpoints.Verify(cp.VerifyRequest(full=True, live=True), timeout=HANG)
    assert not sound.result.differences
    assert not (model_folder.parent / f".{model_folder.name}.apollo").exists()
    (state,) = elsewhere.iterdir()
    assert {"manifest.json", "snapshots"} <= set(os.listdir(state))  # noqa: PTH208


def test_of_two_servers_on_one_directory_the_second_is_refused_until_the_first_ends(
    model_folder: Path,
) -> None:
    with served(model_folder) as one, served(model_folder) as other:
        with ApolloClient(one.address) as client:
            list(client.train([SAMPLE], lr=1e-2))
            client.sync()
            client.create_snapshot("first")
        before = loaded(model_folder)
        with ApolloClient(other.address) as client:
            list(client.train([SAMPLE], epochs=3, lr=1e-2))
            # To look at them writes nothing.
            assert [s.name for s in client.list_snapshots().snapshots] == ["first"]
            for refused in (client.sync, client.create_snapshot):
                with pytest.raises(Unavailable) as caught:
                    refused()
                assert caught.value.reason == "STATE_FOLDER_BUSY"
            assert same(before, loaded(model_folder))
            assert one.end() == 0
            client.sync()
            assert [s.name for s in client.list_snapshots().snapshots] == ["first"]
        assert not same(before, loaded(model_folder))
