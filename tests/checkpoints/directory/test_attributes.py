"""ACLs, labels and what users attach to files are there after a sync as before it."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from apollo_trainer.checkpoints.directory.sync import SyncMethod, SyncOptions
from tests.checkpoints.directory.test_faulty_disk import generation_of, made, synced

ACL, NOTE = "system.posix_acl_access", "user.note"
# acl(5), <linux/posix_acl_xattr.h>: tag, permissions, id. User 12 may read, others may not.
ENTRIES = [(1, 6, -1), (2, 4, 12), (4, 4, -1), (16, 4, -1), (32, 0, -1)]
READABLE_BY_12 = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *e) for e in ENTRIES)
METHODS = [None, SyncMethod.ROLLFORWARD, SyncMethod.IN_PLACE]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "model")


@pytest.mark.parametrize("method", METHODS)
def test_a_sync_keeps_extended_attributes(folder: Path, method: Any) -> None:
    shard = folder / "a.safetensors"
    for path in (folder, shard, folder / "config.json"):
        os.setxattr(path, NOTE, path.name.encode())
    os.setxattr(shard, ACL, READABLE_BY_12)
    for generation in (2, 3):
        synced(folder, generation, SyncOptions(method))
        assert generation_of(folder) == generation
        for path in (folder, shard, folder / "config.json"):
            assert os.getxattr(path, NOTE) == path.name.encode()
        assert os.getxattr(shard, ACL) == READABLE_BY_12
        assert os.listxattr(folder / "b.safetensors") == []


def test_what_a_new_file_would_inherit_is_not_added(folder: Path) -> None:
    state = folder.with_name(".model.apollo")
    os.setxattr(state, "system.posix_acl_default", READABLE_BY_12)
    synced(folder, 2, SyncOptions())
    for path in (folder, *folder.iterdir()):
        assert os.listxattr(path) == []


def test_one_that_the_file_system_refuses_is_told_and_the_sync_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def refuse(path: Any, name: str, value: bytes) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    os.setxattr(folder / "a.safetensors", NOTE, b"mine")
    monkeypatch.setattr(os, "setxattr", refuse)
    synced(folder, 2, SyncOptions())
    assert "user.note of a.safetensors was not kept: Operation not permitted" in caplog.text
    assert generation_of(folder) == 2
