"""A sync that was cut off, and whose remains are damaged or are to be settled without a server."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from apollo_grpc.errors import ApolloError, DataLoss, FailedPrecondition
from apollo_trainer.checkpoints.directory.export import export_directory
from apollo_trainer.checkpoints.directory.state_folder import Place, place_of
from apollo_trainer.checkpoints.directory.sync import SyncMethod, SyncOptions
from apollo_trainer.main import main
from tests import programs
from tests.checkpoints.crash_protocols import reader, weights
from tests.checkpoints.directory.test_faulty_disk import generation_of, made, synced
from tests.checkpoints.faulty_disk import FaultyFiles, tree
from tests.waiting import HANG

# Dies by SIGKILL as it is about to rename a shard, with config.json aside.
KILLED_SYNC = """
import os, signal, sys
from pathlib import Path
import torch
from apollo_trainer.checkpoints.disk.file_ops import FileOps
from apollo_trainer.checkpoints.directory.sync import SyncMethod, SyncOptions, sync_directory
from apollo_trainer.weights.checkpoint_plan import plan_checkpoint
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from apollo_trainer.weights.live_model import meta_model

class Dies(FileOps):
    def rename(self, source, target):
        if target.name.startswith(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        super().rename(source, target)

folder = Path(sys.argv[1])
plan = plan_checkpoint(meta_model(str(folder)))
live = {name: torch.nn.Parameter(torch.full(shape, 2.0)) for name, shape in plan.roots.items()}
options = SyncOptions(SyncMethod.ROLLFORWARD, ops=Dies())
sync_directory(folder, CheckpointReader(plan, live), options=options)
"""


def recover_offline(folder: Path, log: Path) -> tuple[int, str]:
    """What the command exits with, as a process of its own, and what it prints."""
    command = (programs.SERVER, "recover", str(folder))
    status = programs.start(*command, env=os.environ, log=log).wait(HANG)
    return status, log.read_text()


@pytest.mark.parametrize("at", ["model-00001", pytest.param("model-00003", marks=pytest.mark.long)])
def test_a_killed_sync_whose_config_is_aside_is_settled_without_a_server(
    live_directory: Any, tmp_path: Path, at: str
) -> None:
    live = live_directory("untied", shard_size="20KB")
    assert programs.run(KILLED_SYNC, live.folder, at)[0] == -signal.SIGKILL
    assert not (live.folder / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(live.folder)
    status, told = recover_offline(live.folder, tmp_path / "log")
    assert status == 0, told
    # Nothing else is told; Python warns of a module that the fork server had imported before.
    (line,) = [line for line in told.splitlines() if "runpy" not in line]
    assert "is whole, of generation 1" in line
    assert {float(v) for p in live.loaded().values() for v in p.detach().unique()} == {2.0}
    assert settled_here(live.folder) == 0


def settled_here(folder: Path) -> int:
    """What the command exits with, run in this process."""
    with pytest.raises(SystemExit) as exited:
        main(["recover", str(folder)])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def test_what_there_is_nothing_to_settle_of_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settled_here(tmp_path) == 0
    assert "was never synced" in capsys.readouterr().out
    (tmp_path / ".config.json.apollo-aside").write_text("{}")
    assert settled_here(tmp_path) == 1
    assert "--checkpoint-dir" in capsys.readouterr().err
    assert settled_here(tmp_path / "absent") == 1
    assert "is no folder" in capsys.readouterr().err


class Dies(FaultyFiles):
    """Ends a sync at the first rename to, or the first write into, a file of that name."""

    def __init__(self, name: str):
        super().__init__(-1, "EIO")
        self._name = name

    def rename(self, source: Path, target: Path) -> None:
        if target.name == self._name:
            self.raise_fault(target)
        super().rename(source, target)

    def open(self, path: Path, *, write: bool = False) -> int:
        if write and path.name == self._name:
            self.raise_fault(path)
        return super().open(path, write=write)


def cut_off(tmp_path: Path, method: SyncMethod) -> Place:
    """A directory whose first shard alone is of generation 2."""
    folder = made(tmp_path / "model")
    with pytest.raises(OSError, match="Input/output"):
        synced(folder, 2, SyncOptions(method, ops=Dies("b.safetensors")))
    assert generation_of(folder) == "mix"
    assert not (folder / "config.json").exists()
    return place_of(folder)


def assert_nobody_loads_a_mix(place: Place, reason: str, kind: type[ApolloError]) -> None:
    """Neither a sync nor the command settles it, and both leave everything as it is."""
    before = tree(place.directory)
    for _ in range(2):
        with pytest.raises(kind) as caught:
            synced(place.directory, 3, SyncOptions())
        assert caught.value.reason == reason
    assert settled_here(place.directory) == 1
    assert tree(place.directory) == before
    assert "config.json" not in before


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


METHODS = [SyncMethod.ROLLFORWARD, SyncMethod.IN_PLACE]


@pytest.mark.parametrize("method", METHODS)
def test_an_announcement_that_was_damaged_or_lost_leaves_the_config_aside(
    tmp_path: Path, method: SyncMethod
) -> None:
    place = cut_off(tmp_path, method)
    whole = place.intent_path.read_bytes()
    place.intent_path.write_bytes(whole[:-7])
    assert_nobody_loads_a_mix(place, "MANIFEST_UNREADABLE", FailedPrecondition)
    # Moved away, as that message says.
    place.intent_path.unlink()
    assert_nobody_loads_a_mix(place, "SYNC_CANNOT_FINISH", DataLoss)
    place.intent_path.write_bytes(whole)
    synced(place.directory, 3, SyncOptions())
    assert generation_of(place.directory) == 3


@pytest.mark.parametrize("method", METHODS)
def test_what_was_learned_is_exported_from_a_directory_that_is_mixed(
    tmp_path: Path, method: SyncMethod
) -> None:
    place, out = cut_off(tmp_path, method), tmp_path / "out"
    export_directory(place.directory, out, reader(2))
    assert (out / "config.json").read_text() == "{}"
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == weights(2).keys()
    assert all(torch.equal(exported[name], values) for name, values in weights(2).items())


def test_a_log_that_was_damaged_is_not_written(tmp_path: Path) -> None:
    place = cut_off(tmp_path, SyncMethod.IN_PLACE)
    (log,) = place.state.glob("redo-*")
    damage(log)
    assert_nobody_loads_a_mix(place, "SYNC_CANNOT_FINISH", DataLoss)


def test_a_log_that_is_cut_short_is_not_written(tmp_path: Path) -> None:
    place = cut_off(tmp_path, SyncMethod.IN_PLACE)
    (log,) = place.state.glob("redo-*")
    os.truncate(log, 100)
    assert_nobody_loads_a_mix(place, "SYNC_CANNOT_FINISH", DataLoss)


def test_a_shard_that_was_replaced_meanwhile_is_not_written_into(tmp_path: Path) -> None:
    place = cut_off(tmp_path, SyncMethod.IN_PLACE)
    shard = place.directory / "b.safetensors"
    data = shard.read_bytes()
    shard.rename(tmp_path / "b")
    shard.write_bytes(data)
    assert_nobody_loads_a_mix(place, "SYNC_CANNOT_FINISH", DataLoss)


def test_a_new_shard_that_was_taken_away_leaves_the_config_aside(tmp_path: Path) -> None:
    place = cut_off(tmp_path, SyncMethod.ROLLFORWARD)
    place.beside("b.safetensors").unlink()
    assert_nobody_loads_a_mix(place, "SYNC_CANNOT_FINISH", DataLoss)
    # What the message says to do.
    for path in place.directory.iterdir():
        path.unlink()
    made(tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        path.rename(place.directory / path.name)
    snapshot = place.state / "snapshots" / "00000001-0123456789ab"
    snapshot.mkdir(parents=True)
    for path in (place.manifest_path, place.intent_path):
        path.unlink()
    synced(place.directory, 3, SyncOptions())
    assert generation_of(place.directory) == 3
    assert snapshot.exists()
