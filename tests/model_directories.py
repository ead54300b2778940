"""Model directories as people have them, and the round trip that each of them must survive."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from apollo_client import ApolloClient
from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import checkpoint_pb2 as cp
from examples.byte_model import byte_tokenizer, random_model
from tests.vllm.families import SMALL

Tensors = dict[str, torch.Tensor]
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SERVED = BF16
IDS = list(range(70, 110))
SAMPLE = {"context_ids": IDS[:25], "continuation_ids": IDS[25:]}
TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
META = {"format": "pt", "from": "a test"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COPY = "lm_head.weight"
LONG_AGO = 1_500_000_000
# Of bfloat16, at the median of the tokens.
NATS_APART = 0.05


class Served(Protocol):
    """A directory that an engine serves, with a training server that is attached."""

    client: ApolloClient

    def scores(self, ids: list[int]) -> torch.Tensor:
        """The engine's log-probability of each token after the first."""


# Serves a directory in `SERVED`, with settings of the training server's.
Serve = Callable[..., AbstractContextManager[Served]]


@dataclass(frozen=True)
class Case:
    """A directory and what is to become of it.

    Attributes:
        write: makes the directory's weights of tensors.
        dtype: of those.
        tied: what config.json says of embedding and head.
        refused: the reason why it cannot be synced, and what is said then; empty where it can.
        syncs: that were made before.
        settings: of the training server's.
    """

    write: Callable[[Path, Tensors], None]
    dtype: torch.dtype = BF16
    tied: bool = True
    refused: tuple[str, str] = ("", "")
    syncs: int = 0
    read_only: bool = False
    settings: tuple[tuple[str, Any], ...] = ()


def one_file(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / SINGLE, META)


def shards(folder: Path, tensors: Tensors, part: str = "model") -> dict[str, str]:
    """Two files without an index; returns which of them each tensor is in."""
    names, where = sorted(tensors), dict[str, str]()
    half = len(names) // 2
    for number, some in enumerate((names[:half], names[half:]), 1):
        file = f"{part}-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, folder / file, META)
        where |= dict.fromkeys(some, file)
    return where


def indexed(folder: Path, where: dict[str, str], **more: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": where} | more, indent=1))


def sharded(folder: Path, tensors: Tensors) -> None:
    size = sum(t.nbytes for t in tensors.values())
    indexed(folder, shards(folder, tensors), metadata={"total_size": size})


def mixed(folder: Path, tensors: Tensors) -> None:
    """Norms in float32, MLPs in float16, under a config.json that says bfloat16."""
    dtypes = {name: F32 if "norm" in name else F16 if "mlp" in name else BF16 for name in tensors}
    one_file(folder, {name: t.to(dtypes[name]) for name, t in tensors.items()})


def tied_with_a_copy(folder: Path, tensors: Tensors) -> None:
    one_file(folder, tensors | {COPY: tensors["model.embed_tokens.weight"].clone()})


def extra_tensors(folder: Path, tensors: Tensors) -> None:
    extra = {
        f"model.layers.{n}.self_attn.rotary_emb.cos_cached": torch.rand(8, 8, dtype=F32)
        for n in (0, 1)
    }
    save_file(extra, folder / "model-extra.safetensors", META)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    where = shards(folder, tensors | old)
    indexed(folder, where | dict.fromkeys(extra, "model-extra.safetensors"), metadata={})


def without_metadata(folder: Path, tensors: Tensors) -> None:
    indexed(folder, shards(folder, tensors))


def two_generations(folder: Path, tensors: Tensors) -> None:
    """The shards of an older save lie there still; no index names them."""
    shards(folder, {name: t * 2 for name, t in tensors.items()}, "older")
    sharded(folder, tensors)


def links(folder: Path, tensors: Tensors) -> None:
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    sharded(folder, tensors)
    for file in sorted(path.name for path in folder.glob("*.safetensors")):
        (folder / file).rename(blobs / file)
        (folder / file).symlink_to(f"../blobs/{file}")


def bin_only(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


UNCOMPARED = (("check_values", False),)
CASES = {
    "float32": Case(one_file, F32),
    "float16": Case(one_file, F16),
    "bfloat16": Case(one_file, tied=False),
    "mixed": Case(mixed, F32),
    "sharded": Case(sharded, tied=False),
    "tied with a copy": Case(tied_with_a_copy, F32),
    "extra tensors": Case(extra_tensors),
    "index without metadata": Case(without_metadata, F32, tied=False),
    "two generations": Case(two_generations, syncs=2),
    "links": Case(links, F32, refused=("SHARD_IS_LINKED", "is a link: ")),
    "bin only": Case(
        bin_only, refused=("CHECKPOINT_INCOMPLETE", "(there are none)"), settings=UNCOMPARED
    ),
    "read-only": Case(
        one_file,
        F32,
        refused=("DIRECTORY_NOT_WRITABLE", "Nothing can be written to "),
        read_only=True,
    ),
}


def make(folder: Path, case: Case, fields: dict[str, Any] = TINY) -> Path:
    """A Qwen3 of random weights, in a directory with other files, whose times are old."""
    folder.mkdir(parents=True)
    config = Qwen3Config(**SMALL | fields, tie_word_embeddings=case.tied)
    model = random_model(config, seed=7)
    model.config.dtype, model.config.architectures = BF16, [type(model).__name__]
    tensors = {name: p.detach().to(case.dtype) for name, p in model.named_parameters()}
    case.write(folder, tensors)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "original").mkdir(mode=0o750)
    (folder / "original" / "params.json").write_text("{}")
    (folder / "LICENSE").symlink_to("original/params.json")
    (folder / "README.md").write_text("# mine")
    (folder / "README.md").chmod(0o640)
    for path in folder.rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO), follow_symlinks=False)
    return folder


@dataclass(frozen=True)
class File:
    """A file, or where a link points; times of links and folders are the system's own."""

    content: bytes
    mode: int
    owner: tuple[int, int]
    mtime: int


def files(folder: Path) -> dict[str, File]:
    """All below a folder by relative path."""

    def entries() -> Iterator[tuple[str, File]]:
        for path in sorted(folder.rglob("*")):
            found, content = path.lstat(), b""
            if stat.S_ISLNK(found.st_mode):
                content = os.fsencode(path.readlink())
            elif path.is_file():
                content = path.read_bytes()
            mtime = found.st_mtime_ns if stat.S_ISREG(found.st_mode) else 0
            owner = (found.st_uid, found.st_gid)
            yield str(path.relative_to(folder)), File(content, found.st_mode, owner, mtime)

    return dict(entries())


def tensors(folder: Path) -> Tensors:
    """Of all weight files; of a pickled one as the engine serves it."""
    if pickled := list(folder.glob("*.bin")):
        return {n: t.to(SERVED) for n, t in torch.load(pickled[0], weights_only=True).items()}
    names = ["older" not in path.name and path for path in sorted(folder.glob("*.safetensors"))]
    return {n: t for path in names if path for n, t in load_file(path).items()}


def round_trip(case: Case, folder: Path, serve: Serve) -> None:
    """Attach, train a step, sync, undo, sync; `folder` is one of `make`."""
    with serve(folder, **dict(case.settings)) as served:
        detail = served.client.status().attachment_detail
        for _ in range(case.syncs):
            learn(served)
            served.client.sync()
        if case.refused[0]:
            assert "A sync would be refused: " in detail
            assert case.refused[1] in detail
            assert "apollo checkpoint export" in detail
            _refused(case, folder, served)
        else:
            assert "would be refused" not in detail
            _synced(folder, served)
    if case.refused[0]:
        with serve(folder.parent.with_name("exported")) as again:
            assert "would be refused" not in again.client.status().attachment_detail
            assert again.client.sync().method == cp.SYNC_METHOD_UNCHANGED


def learn(served: Served) -> None:
    for _ in served.client.train([SAMPLE], epochs=1, lr=1e-2):
        pass


def _synced(folder: Path, served: Served) -> None:
    before, values = files(folder), tensors(folder)
    assert served.client.sync().method == cp.SYNC_METHOD_UNCHANGED
    assert files(folder) == before
    learn(served)
    written = set(served.client.sync().files_written)
    assert_same_files(folder, before, written)
    learned = tensors(folder)
    assert_keeps_what_was_not_trained(values, learned)
    exported = folder.with_name("exported")
    served.client.export(exported)
    assert_same_tensors(tensors(exported), learned)
    assert_scores(served, exported)
    assert served.client.verify(full=True, live=True).differences == []
    served.client.undo(1)
    assert set(served.client.sync().files_written) == written
    assert_same_files(folder, before, written)
    assert_same_tensors(tensors(folder), values)
    assert all(found.content == before[name].content for name, found in files(folder).items())


def _refused(case: Case, folder: Path, served: Served) -> None:
    before, values = files(folder.parent), tensors(folder)
    learn(served)
    with pytest.raises(FailedPrecondition) as caught:
        served.client.sync()
    assert caught.value.reason == case.refused[0]
    assert case.refused[1] in caught.value.message
    assert "apollo checkpoint export" in caught.value.message
    exported, back = (folder.parent.with_name(name) for name in ("exported", "back"))
    served.client.export(exported)
    assert_keeps_what_was_not_trained(values, tensors(exported))
    assert_scores(served, exported)
    served.client.undo(1)
    served.client.export(back)
    assert_same_tensors(tensors(back), values)
    now = {name: f for name, f in files(folder.parent).items() if ".apollo" not in name}
    assert now == before


def assert_same_files(folder: Path, before: dict[str, File], written: set[str]) -> None:
    """But for the bytes and times of what was written, and no byte of that before its tensors."""
    now = files(folder)
    assert now.keys() == before.keys()
    for name, old in before.items():
        new = now[name]
        assert (new.mode, new.owner) == (old.mode, old.owner), name
        if name not in written:
            assert new == old, name
            continue
        head = 8 + int.from_bytes(old.content[:8], "little")
        assert new.content[:head] == old.content[:head], name


def assert_keeps_what_was_not_trained(old: Tensors, new: Tensors) -> None:
    """By what the engine serves: where that is the same, so are the bits on disk."""
    assert new.keys() == old.keys()
    assert {name: t.dtype for name, t in new.items()} == {name: t.dtype for name, t in old.items()}
    moved = dict[str, int]()
    for name, values in new.items():
        same = _bits(values.to(SERVED)) == _bits(old[name].to(SERVED))
        assert torch.equal(_bits(values)[same], _bits(old[name])[same]), name
        moved[name] = int((~same).sum())
    parameters = {name for name in old if "rotary_emb" not in name}
    assert {name for name, count in moved.items() if count} == parameters
    assert any(0 < moved[name] < new[name].numel() for name in parameters)


def assert_same_tensors(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype, name
        assert torch.equal(_bits(found[name]), _bits(values)), name


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view({2: torch.int16, 4: torch.int32}[values.itemsize])


def assert_scores(served: Served, folder: Path) -> None:
    """transformers loads what is on disk as what the engine serves, and the tokenizer with it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=SERVED).eval()
    with torch.no_grad():
        scores = model(torch.tensor([IDS])).logits[0, :-1].float().log_softmax(-1)
    ours = scores.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    assert (served.scores(IDS) - ours).abs().median() < NATS_APART
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"]
