"""What callers are told of a server and of the model that it is attached to."""

from __future__ import annotations

import hashlib
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_grpc.transport import MAX_MESSAGE_BYTES
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine.coherence import coherence_of
from apollo_trainer.engine.server_info import ServerInfo, tokenizer_digest
from tests.trainers import Trainer
from tests.waiting import wait_until

ATTACHED = status_pb2.ATTACHMENT_STATE_ATTACHED
FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt")


def info_of(trainer: Trainer) -> status_pb2.GetServerInfoResponse:
    return ServerInfo(trainer.owner, trainer.settings).now()


def test_limits_and_versions_are_told_without_an_engine(start_trainer: Any) -> None:
    trainer = start_trainer(
        max_samples=5,
        max_queued_runs=6,
        max_queued_mebibytes=7,
        max_dataset_samples=8,
        dataset_mebibytes=9,
    )
    info = info_of(trainer)
    assert not info.HasField("model")
    assert info.server_version == version("apollo-grpc")
    assert {name: version(name) for name in info.versions} == dict(info.versions)
    assert {"torch", "transformers", "grpcio", "protobuf"} <= set(info.versions)
    limits, settings = info.limits, trainer.settings
    assert (limits.samples, limits.queued_runs, limits.queued_bytes) == (5, 6, 7 * 2**20)
    assert (limits.streams, limits.watchers) == (settings.max_streams, settings.max_watchers)
    assert limits.message_bytes == MAX_MESSAGE_BYTES
    assert (limits.dataset_samples, limits.dataset_bytes) == (8, 9 * 2**20)


def test_the_model_is_told_as_it_is_attached(attached: Any, model_folder: Path) -> None:
    engine, trainer = attached
    model = info_of(trainer).model
    live = engine.model.module
    assert (model.directory, model.architecture) == (str(model_folder), type(live).__name__)
    assert model.parameters == sum(p.numel() for p in live.parameters())
    assert (model.vocabulary, model.max_length, model.dtype) == (259, 48, "float32")
    assert model.tokenizer_digest == tokenizer_digest(model_folder) != ""
    for mode in model.coherence_modes:
        coherence_of(pb.Coherence(mode=mode), trainer.sidecar, Any, 1.0)
    assert set(model.coherence_modes) == set(pb.CoherenceMode.values()) - {0}


def test_what_does_not_change_is_found_once_an_attachment(
    attached: Any, start_engine: Any, model_folder: Path
) -> None:
    engine, trainer = attached
    before = info_of(trainer).model.tokenizer_digest
    (model_folder / "tokenizer_config.json").write_text("{}")
    assert info_of(trainer).model.tokenizer_digest == before
    engine.stop()
    wait_until(lambda: not info_of(trainer).HasField("model"), "the loss of the engine")
    other = start_engine()
    trainer.wait_for(ATTACHED, other.engine.epoch)
    assert info_of(trainer).model.tokenizer_digest == tokenizer_digest(model_folder) != before


def test_updates_that_can_be_taken_back_are_counted(attached: Any, all_events: Any) -> None:
    _, trainer = attached
    assert info_of(trainer).model.undoable_updates == 0
    all_events(trainer.submit(epochs=3))
    assert info_of(trainer).model.undoable_updates == 3
    trainer.owner.session().checkpoints.poison.why = "a restore was cut off."
    assert info_of(trainer).model.undoable_updates == 0


def test_vllm_tells_its_version(
    start_engine: Any, start_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine()
    monkeypatch.setattr(type(engine.engine.vllm), "version", "0.32.1")
    trainer = start_trainer()
    trainer.wait_for(ATTACHED)
    assert info_of(trainer).model.vllm_version == "0.32.1"


def test_the_digest_is_what_sha256sum_says_of_the_files(tmp_path: Path) -> None:
    for name in (*FILES, "config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    (tmp_path / "tokenizer.model").symlink_to(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer_folder").mkdir()
    names = sorted([*FILES, "tokenizer.model"])
    told = subprocess.run(["sha256sum", *names], cwd=tmp_path, capture_output=True, check=True)
    assert tokenizer_digest(tmp_path) == hashlib.sha256(told.stdout).hexdigest()


@given(st.dictionaries(st.sampled_from(FILES), st.binary(max_size=4)), st.data())
def test_any_change_of_a_name_or_a_content_is_another_digest(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], data: st.DataObject
) -> None:
    other = data.draw(st.dictionaries(st.sampled_from(FILES), st.binary(max_size=4)))
    folder = tmp_path_factory.mktemp("tokenizers")
    digests = []
    for each in (files, other):
        for name, content in each.items():
            (folder / name).write_bytes(content)
        digests.append(tokenizer_digest(folder))
        for name in each:
            (folder / name).unlink()
    assert (digests[0] == digests[1]) == (files == other)
    assert (digests[0] == "") == (not files)


def test_a_file_that_cannot_be_read_makes_no_digest(tmp_path: Path) -> None:
    assert tokenizer_digest(tmp_path / "none") == ""
