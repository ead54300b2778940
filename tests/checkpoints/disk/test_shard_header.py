"""Headers of safetensors files: those of the library, bit for bit, and nothing malformed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from apollo_trainer.checkpoints.disk.digests import raw_bytes
from apollo_trainer.checkpoints.disk.file_ops import FILES
from apollo_trainer.checkpoints.disk.shard_header import DTYPES, build_header, parse_header
from apollo_trainer.checkpoints.disk.tensor_file import (
    digest_at,
    read_header,
    write_tensors,
)

LIBRARY_KNOWS = [d for d in DTYPES.values() if not d.is_complex]


def raw(content: Any, length: int | None = None) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    made = {f"t.{n}": torch.rand(3, n + 1).to(d) for n, d in enumerate(LIBRARY_KNOWS)}
    return made | {"scalar": torch.tensor(7.5), "empty": torch.empty(0, 4), "é": torch.ones(1)}


def test_a_file_is_the_one_that_the_library_writes(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_tensors(some_tensors(), ours, {"format": "pt"})
    save_file(some_tensors(), theirs, metadata={"format": "pt"})
    assert read_header(FILES, ours).tensors == read_header(FILES, theirs).tensors
    loaded = load_file(ours)
    assert loaded.keys() == some_tensors().keys()
    for name, tensor in some_tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert raw_bytes(loaded[name]).data == raw_bytes(tensor).data


def test_digests_are_those_of_the_bytes_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "file"
    digests = write_tensors(some_tensors(), path, None)
    with FILES.opened(path) as file:
        found = {
            name: digest_at(FILES, file, place)
            for name, place in read_header(FILES, path).tensors.items()
        }
    assert found == digests
    assert len(set(digests.values())) == len(digests)


@pytest.mark.parametrize(
    ("content", "size"),
    [
        ([], 0),
        ({"x": entry(dtype="F33")}, 8),
        ({"x": entry(shape=(3,))}, 8),
        ({"x": entry(shape=(-2,))}, 8),
        ({"x": entry(shape=(1 << 62, 1 << 62))}, 8),
        ({"x": entry(shape=("2",))}, 8),
        ({"x": entry(offsets=(0, 8, 9))}, 8),
        ({"x": entry(offsets=(8, 0))}, 8),
        ({"x": entry(offsets=(4, 12))}, 12),
        ({"x": entry(), "y": entry()}, 8),
        ({"x": entry(), "y": entry(offsets=(4, 12))}, 12),
        ({"x": entry()}, 7),
        ({"x": entry()}, 9),
        ({"x": {"dtype": "F32"}}, 0),
        ({"x": None}, 0),
        ({"x": {**entry(), "more": 1}}, 8),
    ],
)
def test_a_malformed_header_is_refused(content: Any, size: int) -> None:
    header = raw(content)
    with pytest.raises(ValueError):
        parse_header(header, len(header) + size)


@pytest.mark.parametrize("length", [0, 5, 1 << 40, (1 << 64) - 1])
def test_a_header_of_another_length_is_refused(length: int) -> None:
    header = raw({"x": entry()}, length)
    with pytest.raises(ValueError):
        parse_header(header, len(header) + 8)


def test_a_name_that_stands_there_twice_is_refused() -> None:
    text = b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{"dtype":"U8","shape":[0],'
    text += b'"data_offsets":[0,0]}}'
    with pytest.raises(ValueError, match="twice"):
        parse_header(struct.pack("<Q", len(text)) + text, 8 + len(text))


@given(st.binary(max_size=64), st.integers(0, 1 << 63))
def test_any_bytes_are_a_value_error_or_a_header(data: bytes, size: int) -> None:
    try:
        header = parse_header(data, size)
    except ValueError:
        return
    assert header.size == size


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
       st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
       max_size=5))  # fmt: skip
def test_a_header_comes_back_as_it_was(asked: dict[str, tuple[str, list[int]]]) -> None:
    asked.pop("__metadata__", None)
    tensors = {n: torch.empty(s, dtype=DTYPES[d], device="meta") for n, (d, s) in asked.items()}
    header = build_header(tensors, {"format": "pt"})
    assert len(header.raw) % 8 == 0
    assert parse_header(header.raw, header.size).tensors == header.tensors


def test_a_dtype_that_the_format_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="complex128"):
        build_header({"x": torch.empty(2, dtype=torch.complex128)}, None)
