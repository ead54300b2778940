"""A manifest is read back as it was written, and nothing else is taken for one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_trainer.checkpoints.directory.manifest import (
    FORMAT,
    Manifest,
    ShardRecord,
    TensorRecord,
    is_shard_name,
)
from apollo_trainer.checkpoints.disk.shard_header import DTYPES, TensorPlace

WHOLE = st.integers(0, (1 << 62) - 1)
DIGESTS = st.integers(0, (1 << 128) - 1).map("{:032x}".format)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SHARD_NAMES = NAMES.map(lambda name: f"{name}.safetensors").filter(is_shard_name)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    shards, tensors = {}, {}
    for name in draw(st.lists(SHARD_NAMES, max_size=3, unique=True)):
        end = draw(st.integers(8, 100))
        for tensor in draw(st.lists(NAMES, max_size=3)):
            dtype = draw(st.sampled_from(sorted(DTYPES)))
            shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
            start, size = end, DTYPES[dtype].itemsize
            for length in shape:
                size *= length
            if tensor in tensors:
                continue
            end += size
            place = TensorPlace(dtype, shape, start, end)
            tensors[tensor] = TensorRecord(name, place, draw(WHOLE), draw(DIGESTS))
        shards[name] = ShardRecord(draw(WHOLE), draw(WHOLE), end, draw(WHOLE), draw(DIGESTS))
    written = tuple(draw(st.lists(st.sampled_from(sorted(shards)), unique=True)) if shards else ())
    return Manifest(draw(WHOLE), draw(NAMES), draw(NAMES), written, shards, tensors)


def encoded(**changes: Any) -> bytes:
    """A sound manifest of one shard with two tensors, but for these entries."""
    digest = "0" * 32
    content = {
        "format": FORMAT,
        "generation": 3,
        "model": "m",
        "method": "exchange",
        "written": ["a.safetensors"],
        "shards": {
            "a.safetensors": {
                "device": 1, "inode": 2, "size": 100, "mtime_ns": 5, "header": digest,
            }
        },
        "tensors": {
            "x": ["a.safetensors", "F32", [2, 3], 50, 7, digest],
            "y": ["a.safetensors", "BF16", [4], 74, 7, digest],
        },
    }  # fmt: skip
    return json.dumps(content | changes).encode()


@given(manifests())
def test_a_manifest_comes_back_as_it_was(manifest: Manifest) -> None:
    assert Manifest.decode(manifest.encode()) == manifest


@given(manifests(), st.data())
def test_a_manifest_that_is_cut_off_anywhere_is_refused(manifest: Manifest, data: Any) -> None:
    whole = manifest.encode()
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ValueError):
        Manifest.decode(whole[:cut])


@given(st.sampled_from(["generation", "model", "method", "written", "shards", "tensors"]), JSON)
def test_what_is_no_manifest_is_a_value_error_or_one(key: str, value: Any) -> None:
    data = encoded(**{key: value})
    try:
        manifest = Manifest.decode(data)
    except ValueError:
        return
    assert Manifest.decode(manifest.encode()) == manifest


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        Manifest.decode(data)


SOUND = ["a.safetensors", "F32", [2, 3], 50, 7, "0" * 32]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, "b.safetensors"),
        (0, ["a.safetensors"]),
        (1, "F33"),
        (2, [1 << 62, 1 << 62]),
        (2, [-2, -3]),
        (2, [2.0, 3]),
        (3, 80),
        (3, -1),
        (3, True),
        (4, "7"),
        (5, "0" * 31),
        (5, "Z" * 32),
    ],
)
def test_a_tensor_that_cannot_be_there_is_refused(at: int, value: Any) -> None:
    entry = [value if place == at else sound for place, sound in enumerate(SOUND)]
    with pytest.raises(ValueError):
        Manifest.decode(encoded(tensors={"x": entry}))


def test_tensors_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="overlaps"):
        Manifest.decode(encoded(tensors={"x": SOUND, "y": SOUND}))


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors", "/a.safetensors", "x/a.safetensors", "..", ".a.safetensors",
        "a\0.safetensors", "x\\a.safetensors", "config.json", "", "a" * 250 + ".safetensors",
    ],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_is_no_shard(name: str) -> None:
    shard = {"device": 1, "inode": 2, "size": 9, "mtime_ns": 5, "header": "0" * 32}
    with pytest.raises(ValueError):
        Manifest.decode(encoded(shards={name: shard}, tensors={}, written=[]))


def test_endless_nesting_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        Manifest.decode(b"[" * 100_000)
