"""A directory keeps its own dtypes: what was not trained keeps its bits, what was is widened."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.checkpoints.directory import disk_values
from apollo_trainer.checkpoints.directory.disk_values import bytes_to_write
from apollo_trainer.checkpoints.directory.export import export_directory
from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.sync import SyncMethod, SyncOptions, sync_directory
from apollo_trainer.checkpoints.directory.verify import verify_directory
from apollo_trainer.checkpoints.disk.file_ops import FILES
from apollo_trainer.checkpoints.disk.tensor_file import read_header
from apollo_trainer.weights.checkpoint_reader import CheckpointReader

Make = Callable[..., Any]
NAME = "model.layers.1.mlp.down_proj.weight"
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
METHODS = [None, SyncMethod.ROLLFORWARD, SyncMethod.IN_PLACE]


def served(live: Any, dtype: torch.dtype) -> CheckpointReader:
    """The directory's values as an engine that serves in this dtype holds them."""
    with torch.no_grad():
        for name, parameter in live.parameters.items():
            live.parameters[name] = torch.nn.Parameter(parameter.to(dtype))
    live.reader = CheckpointReader(live.plan, live.parameters)
    return live.reader


def stored(live: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Rewrites the directory's one shard in another dtype; returns its tensors."""
    shard = live.folder / "model.safetensors"
    tensors = {name: t.to(dtype) for name, t in load_file(shard).items()}
    save_file(tensors, shard, {"format": "pt"})
    with torch.no_grad():
        for name, parameter in live.parameters.items():
            parameter.copy_(tensors[name])
    return tensors


@pytest.mark.parametrize("counted", [True, False])
def test_what_was_not_trained_changes_no_byte(live_directory: Make, counted: bool) -> None:
    live = live_directory("untied", shard_size="20KB")
    reader, before = served(live, BF16), live.files()
    versions = (lambda name: 7) if counted else None
    for _ in range(2):
        outcome = sync_directory(live.folder, reader, versions=versions)
        assert (outcome.method, outcome.tensors_changed) == (SyncMethod.UNCHANGED, 0)
    assert live.files() == before
    assert verify_directory(live.folder, reader, full=True).differences == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("on_disk", "live_dtype"), [(F32, BF16), (F32, F16), (F16, BF16), (BF16, F32), (F64, F32)]
)
def test_trained_values_are_written_in_the_dtype_of_the_directory(
    live_directory: Make, on_disk: torch.dtype, live_dtype: torch.dtype, method: Any
) -> None:
    live = live_directory("untied")
    before, config = stored(live, on_disk), (live.folder / "config.json").read_bytes()
    reader = served(live, live_dtype)
    with torch.no_grad():
        live.parameters[NAME][:, ::2].add_(0.25)
    outcome = sync_directory(live.folder, reader, options=SyncOptions(method))
    after = load_file(live.folder / "model.safetensors")
    assert outcome.tensors_changed == 1
    assert {name: t.dtype for name, t in after.items()} == dict.fromkeys(before, on_disk)
    for name in before.keys() - {NAME}:
        assert torch.equal(after[name], before[name])
    assert torch.equal(after[NAME][:, 1::2], before[NAME][:, 1::2])
    assert torch.equal(after[NAME][:, ::2], live.parameters[NAME][:, ::2].to(on_disk))
    assert (live.folder / "config.json").read_bytes() == config
    assert verify_directory(live.folder, reader, full=True).differences == []
    assert sync_directory(live.folder, reader).method == SyncMethod.UNCHANGED


def test_what_is_loaded_again_is_what_was_served(live_directory: Make) -> None:
    live = live_directory("tied")
    reader = served(live, BF16)
    live.train()
    sync_directory(live.folder, reader)
    loaded = live.loaded()
    for name, parameter in live.parameters.items():
        assert loaded[name].dtype == F32
        assert torch.equal(loaded[name].to(BF16), parameter)


def test_an_export_keeps_dtypes_and_untrained_values(live_directory: Make, tmp_path: Path) -> None:
    live = live_directory("untied")
    before, reader = load_file(live.folder / "model.safetensors"), served(live, BF16)
    live.train(NAME)
    export_directory(live.folder, tmp_path / "out", reader)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in after.values()} == {F32}
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - {NAME})
    assert torch.equal(after[NAME], live.parameters[NAME].float())


def test_a_value_that_the_directory_cannot_hold_is_refused(
    live_directory: Make, tmp_path: Path
) -> None:
    live = live_directory("untied")
    stored(live, F16)
    reader, before = served(live, BF16), live.files()
    with torch.no_grad():
        live.parameters[NAME][3, 3] = 1e6
    for call in (
        lambda: sync_directory(live.folder, reader),
        lambda: export_directory(live.folder, tmp_path / "out", reader),
    ):
        with pytest.raises(FailedPrecondition) as caught:
            call()
        assert caught.value.reason == "VALUE_DOES_NOT_FIT"
    assert live.files() == before
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_what_the_directory_rounds_is_told(live_directory: Make, caplog: Any) -> None:
    live = live_directory("untied")
    stored(live, F16)
    reader = served(live, BF16)
    with torch.no_grad():
        live.parameters[NAME].fill_(1e-7)
    sync_directory(live.folder, reader)
    assert f"{NAME} and 0 more tensors" in caplog.text
    assert sync_directory(live.folder, reader).method == SyncMethod.UNCHANGED


def test_a_live_tensor_of_another_shape_is_refused(live_directory: Make) -> None:
    live = live_directory("untied")
    shard = live.folder / "model.safetensors"
    tensors = load_file(shard)
    tensors[NAME] = tensors[NAME].view(-1)
    save_file(tensors, shard)
    with pytest.raises(FailedPrecondition) as caught:
        sync_directory(live.folder, live.reader)
    assert caught.value.reason == "CHECKPOINT_INCOMPATIBLE"


@pytest.mark.parametrize("earlier", ["whole", "gone", "cut off", "of another layout"])
def test_what_comes_back_after_a_sync_has_its_bits_where_they_are_still_to_be_had(
    live_directory: Make, tmp_path: Path, earlier: str
) -> None:
    live = live_directory("untied")
    reader, shard = served(live, BF16), live.folder / "model.safetensors"
    # Copies: the file is cut off under whoever has it mapped.
    before = {name: t.clone() for name, t in load_file(shard).items()}
    options = SyncOptions(spare=Spare())
    first = {name: p.detach().clone() for name, p in live.parameters.items()}
    live.train()
    sync_directory(live.folder, reader, options=options)
    kept = tmp_path / ".model.apollo" / "before-0" / shard.name
    if earlier == "gone":
        kept.unlink()
    elif earlier == "cut off":
        os.truncate(kept, kept.stat().st_size - 9000)
    elif earlier == "of another layout":
        save_file({name: t * 2 for name, t in before.items()}, kept, {"format": "other"})
    with torch.no_grad():
        for name, values in first.items():
            live.parameters[name].copy_(values)
    export_directory(live.folder, tmp_path / "out", reader)
    sync_directory(live.folder, reader, options=options)
    assert verify_directory(live.folder, reader, full=True).differences == []
    for after in (load_file(shard), load_file(tmp_path / "out" / shard.name)):
        assert all(torch.equal(after[name].to(BF16), before[name].to(BF16)) for name in before)
        assert all(torch.equal(after[name], before[name]) for name in before) == (
            earlier == "whole"
        )


WORDS = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1), st.booleans()),
                 min_size=1, max_size=40)  # fmt: skip


@given(WORDS)
def test_each_value_is_the_live_one_or_keeps_its_bits(words: Any) -> None:
    """Of any float32 on disk and any bfloat16 live, NaN, inf and zeros of both signs included."""
    disk = torch.tensor([w for w, _, _ in words], dtype=torch.int64).to(torch.int32).view(F32)
    other = torch.tensor([w for _, w, _ in words], dtype=torch.int32).to(torch.int16).view(BF16)
    trained = torch.tensor([t for _, _, t in words])
    live = torch.where(trained, other, disk.to(BF16))
    written = bytes_for(disk, live)
    same = disk.to(BF16).view(torch.int16) == live.view(torch.int16)
    assert torch.equal(written.view(torch.int32)[same], disk.view(torch.int32)[same])
    back = written[~same].to(BF16)
    assert torch.equal(back.isnan(), live[~same].isnan())
    sound = ~back.isnan()
    assert torch.equal(back[sound].view(torch.int16), live[~same][sound].view(torch.int16))
    # A second sync finds nothing to write.
    assert torch.equal(bytes_for(written, live).view(torch.int32), written.view(torch.int32))


@pytest.mark.parametrize("trained", [0, 1, 24_576, 99_999, 100_002])
def test_a_tensor_of_many_pieces_is_compared_to_its_end(
    monkeypatch: pytest.MonkeyPatch, trained: int
) -> None:
    monkeypatch.setattr(disk_values, "PIECE", 1 << 17)
    disk = torch.randn(100_003, generator=torch.Generator().manual_seed(5))
    live = disk.to(BF16)
    live[trained] += 1
    wanted = disk.clone()
    wanted[trained] = live[trained]
    assert torch.equal(bytes_for(disk, live), wanted)


def bytes_for(disk: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file({"x": disk}, path)
        place = read_header(FILES, path).tensors["x"]
        data = b"".join(bytes_to_write(FILES, path, place, live))
    return torch.frombuffer(bytearray(data), dtype=disk.dtype)
