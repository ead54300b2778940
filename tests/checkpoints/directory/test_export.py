"""An export is a directory that transformers loads as the live weights, or there is none."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from apollo_grpc.errors import AlreadyExists, DataLoss, FailedPrecondition
from apollo_trainer.checkpoints.directory import export
from apollo_trainer.checkpoints.directory.adopt import adopt_directory
from apollo_trainer.checkpoints.directory.export import export_directory
from apollo_trainer.checkpoints.directory.preconditions import why_not_synced
from apollo_trainer.checkpoints.directory.recovery import settle_directory
from apollo_trainer.checkpoints.directory.state_folder import place_of
from apollo_trainer.checkpoints.disk import system_calls
from apollo_trainer.checkpoints.disk.system_calls import rename_without_replacing
from apollo_trainer.main import main
from tests.checkpoints.crash_protocols import reader
from tests.checkpoints.directory.test_faulty_disk import made
from tests.checkpoints.faulty_disk import FaultyFiles
from tests.waiting import HANG

Make = Callable[..., Any]
INDEX = "model.safetensors.index.json"


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            names |= set(file.keys())
    return names


@pytest.mark.parametrize("kind", ["tied", "untied", "gpt2"])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_transformers_loads_the_live_weights(
    tmp_path: Path, live_directory: Make, kind: str, shard_bytes: int
) -> None:
    live = live_directory(kind)
    before = live.files()
    live.train()
    target = tmp_path / "out"
    exported = export_directory(live.folder, target, live.reader, shard_bytes=shard_bytes)
    loaded = dict(AutoModelForCausalLM.from_pretrained(target).named_parameters())
    for name, parameter in live.parameters.items():
        torch.testing.assert_close(loaded[name], parameter, rtol=0, atol=0, msg=name)
    assert names_in(target) == names_in(live.folder)
    assert {p.name for p in target.glob("*.safetensors")} == set(exported.files)
    assert (target / INDEX).exists() == (shard_bytes == 20_000)
    assert live.files() == before
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out"}


def test_shards_are_no_larger_than_asked_for_and_all_are_in_the_index(
    tmp_path: Path, live_directory: Make
) -> None:
    live = live_directory("untied")
    exported = export_directory(live.folder, tmp_path / "out", live.reader, shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert len(exported.files) > 3
    assert index["metadata"]["total_size"] == exported.bytes_written
    for shard in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            assert sum(file.get_tensor(n).nbytes for n in file.keys()) <= 20_000  # noqa: SIM118
            assert all(index["weight_map"][n] == shard.name for n in file.keys())  # noqa: SIM118


def test_links_become_files_and_other_weights_stay_behind(
    tmp_path: Path, live_directory: Make
) -> None:
    live = live_directory("tied", shard_size="20KB")
    blob = tmp_path / "blob"
    (live.folder / "config.json").rename(blob)
    (live.folder / "config.json").symlink_to(blob)
    (live.folder / "tokenizer.json").write_text("{}")
    for name in ("pytorch_model.bin", ".hidden", "pytorch_model.bin.index.json"):
        (live.folder / name).write_text("{}")
    export_directory(live.folder, tmp_path / "out", live.reader)
    out = tmp_path / "out"
    assert not any(p.is_symlink() for p in out.iterdir())
    assert (out / "config.json").read_bytes() == blob.read_bytes()
    assert {p.name for p in out.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("what", ["a folder", "a file", "an empty folder", "a dangling link"])
def test_nothing_is_replaced(tmp_path: Path, live_directory: Make, what: str) -> None:
    live, target = live_directory("tied"), tmp_path / "out"
    if what == "a file":
        target.write_text("mine")
    elif what == "a dangling link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir()
        if what == "a folder":
            (target / "mine").write_text("mine")
    with pytest.raises(AlreadyExists, match="nothing was written"):
        export_directory(live.folder, target, live.reader)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out"}
    assert what != "a file" or target.read_text() == "mine"


def test_a_folder_that_appeared_meanwhile_is_not_replaced(
    tmp_path: Path, live_directory: Make
) -> None:
    live, target = live_directory("tied"), tmp_path / "out"
    with pytest.raises(AlreadyExists):
        export_directory(
            live.folder, target, live.reader, progress=lambda *_: target.mkdir(exist_ok=True)
        )
    assert list(target.iterdir()) == []
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize("kernel", [True, False])
def test_a_rename_never_replaces(
    tmp_path: Path, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(system_calls, "_LIBC", object())
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    with pytest.raises(FileExistsError):
        rename_without_replacing(source, target)
    target.rmdir()
    rename_without_replacing(source, target)
    assert target.is_dir()
    assert not source.exists()


def test_what_does_not_read_back_is_removed(
    tmp_path: Path, live_directory: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = live_directory("tied")
    original = export.write_tensors

    def corrupt(tensors: Any, path: Path, *more: Any) -> Any:
        digests = original(tensors, path, *more)
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        return digests

    monkeypatch.setattr(export, "write_tensors", corrupt)
    with pytest.raises(DataLoss) as caught:
        export_directory(live.folder, tmp_path / "out", live.reader)
    assert caught.value.reason == "EXPORT_CORRUPT"
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_a_full_disk_leaves_nothing(tmp_path: Path, live_directory: Make) -> None:
    live = live_directory("untied")
    for number in range(400):
        target, disk = tmp_path / "out", FaultyFiles(number, "ENOSPC")
        try:
            export_directory(live.folder, target, live.reader, shard_bytes=20_000, ops=disk)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        if not disk.failed:
            break
        # Once it has its name it is whole, be the folder's own fsync refused or not.
        if target.exists():
            assert names_in(target) == names_in(live.folder)
            shutil.rmtree(target)
        # What cannot be removed, the next one removes.
        if disk.failed not in ("unlink", "rmdir", "names", "stat"):
            assert {p.name for p in tmp_path.iterdir()} == {"model"}
    assert number > 60
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out"}


KILLED_EXPORT = """
import os, signal, sys
from pathlib import Path
from apollo_trainer.checkpoints.directory.adopt import adopt_directory
from apollo_trainer.checkpoints.directory.export import export_directory
from apollo_trainer.checkpoints.disk.file_ops import FileOps
from tests.checkpoints.crash_protocols import reader

class Dies(FileOps):
    def rename_new(self, source, target):
        print("waiting", flush=True)
        sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGKILL)

export_directory(Path(sys.argv[1]), Path(sys.argv[2]), reader(2), ops=Dies())
"""


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if "apollo-new" in path.name]


def test_what_a_killed_export_left_is_removed_and_what_is_written_is_not(tmp_path: Path) -> None:
    source = made(tmp_path / "model")
    command = [sys.executable, "-c", KILLED_EXPORT, str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"waiting\n"
        export_directory(source, tmp_path / "other", reader(2))
        assert len(unfinished(tmp_path)) == 1
        process.communicate(b"\n", timeout=HANG)
    assert (process.returncode, len(unfinished(tmp_path))) == (-signal.SIGKILL, 1)
    export_directory(source, tmp_path / "out", reader(2))
    assert unfinished(tmp_path) == []


def recovered(folder: Path) -> None:
    with pytest.raises(SystemExit):
        main(["recover", str(folder)])


@pytest.mark.parametrize(
    "by",
    [
        lambda source: adopt_directory(source, source.with_name("copy")),
        lambda source: settle_directory(place_of(source)),
        recovered,
    ],
    ids=["a copy", "the start of a server", "recover"],
)
def test_it_is_removed_too_by(tmp_path: Path, by: Callable[[Path], object]) -> None:
    source = made(tmp_path / "model")
    left = tmp_path / ".out.apollo-new-0123456789ab"
    left.mkdir()
    (left / "config.json").write_text("{}")
    mine = tmp_path / ".out.apollo-new-mine"
    mine.mkdir()
    by(source)
    assert unfinished(tmp_path) == [mine]


def test_a_live_tensor_of_another_shape_is_refused(tmp_path: Path, live_directory: Make) -> None:
    live = live_directory("untied")

    class Padded:
        """An engine's embedding, with rows that no token has."""

        def read(self, name: str) -> torch.Tensor | None:
            values = live.reader.read(name)
            padded = name == "model.embed_tokens.weight"
            return torch.cat([values, values[:4]]) if padded else values

        def outline(self, name: str) -> torch.Tensor | None:
            values = self.read(name)
            return None if values is None else values.to("meta")

        def missing_from(self, names: set[str]) -> list[str]:
            return list(live.reader.missing_from(names))

    with pytest.raises(FailedPrecondition) as caught:
        export_directory(live.folder, tmp_path / "out", Padded())  # type: ignore[arg-type]
    assert caught.value.reason == "CHECKPOINT_INCOMPATIBLE"
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def assert_exported(live: Any, folder: Path) -> None:
    loaded = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    for name, parameter in live.parameters.items():
        torch.testing.assert_close(loaded[name], parameter, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
def test_a_directory_of_another_format_is_exported_as_safetensors(
    tmp_path: Path, live_directory: Make, kind: str
) -> None:
    live = live_directory(kind)
    (live.folder / "model.safetensors").rename(live.folder / "pytorch_model.bin")
    place = place_of(live.folder)
    assert "apollo checkpoint export" in why_not_synced(place, live.reader)
    live.train()
    export_directory(live.folder, tmp_path / "out", live.reader)
    assert_exported(live, tmp_path / "out")
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_what_the_files_lack_is_written_as_it_is_served(
    tmp_path: Path, live_directory: Make
) -> None:
    live = live_directory("tied", shard_size="20KB")
    names = names_in(live.folder)
    sorted(live.folder.glob("*.safetensors"))[0].unlink()
    (live.folder / INDEX).unlink()
    assert "apollo checkpoint export" in why_not_synced(place_of(live.folder), live.reader)
    live.train()
    export_directory(live.folder, tmp_path / "out", live.reader)
    assert names_in(tmp_path / "out") == names
    assert_exported(live, tmp_path / "out")


def test_files_of_other_names_are_not_exported_beside_what_was_learned(
    tmp_path: Path, live_directory: Make
) -> None:
    """As Mistral's own directories have them: with the values of before the training."""
    live = live_directory("untied")
    names = names_in(live.folder)
    (live.folder / "model.safetensors").unlink()
    save_file({"layers.0.wq": torch.rand(3)}, live.folder / "consolidated.safetensors")
    live.train()
    assert "apollo checkpoint export" in why_not_synced(place_of(live.folder), live.reader)
    export_directory(live.folder, tmp_path / "out", live.reader)
    assert names_in(tmp_path / "out") == names
    assert_exported(live, tmp_path / "out")
