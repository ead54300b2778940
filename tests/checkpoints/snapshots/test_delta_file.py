"""A differential on disk comes back exactly, or is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from apollo_grpc.errors import DataLoss
from apollo_trainer.checkpoints.snapshots.delta_file import (
    FORMAT,
    EncodedTensor,
    decode_tensor,
    encode_tensor,
    open_delta,
    write_delta,
)
from apollo_trainer.checkpoints.snapshots.frames import FRAME
from apollo_trainer.weights.checkpoint_reader import same_bytes

ANCHOR = "00000001-0123456789ab"


def tensors() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    old = {
        "layer.weight": torch.randn(30, 20).mul(0.02).bfloat16(),
        "layer.bias": torch.randn(20),
        "same": torch.randn(5).half(),
        "none": torch.empty(0, 3),
    }
    new = {name: t.clone() for name, t in old.items()}
    new["layer.weight"] += 1e-3
    new["layer.weight"][0, :4] = torch.tensor([torch.nan, -0.0, torch.inf, 1e-40])
    new["layer.bias"] += 1e-6
    return old, new


def write(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    old, new = tensors()
    write_delta(path, ANCHOR, {name: encode_tensor(old[name], new[name]) for name in old})
    return old, new


def test_what_was_written_comes_back_bit_for_bit(tmp_path: Path) -> None:
    old, new = write(tmp_path / "delta")
    with open_delta(tmp_path / "delta") as delta:
        assert delta.anchor == ANCHOR
        assert delta.entries["same"].codec == "same"
        for name in old:
            assert same_bytes(delta.decode(name, old[name]), new[name])


@pytest.mark.parametrize("count", [1, FRAME, 3 * FRAME + 5, 6 * FRAME])
@pytest.mark.parametrize("kind", ["near", "far", "same"])
def test_threads_write_and_read_the_same_as_one(count: int, kind: str) -> None:
    torch.manual_seed(count)
    old = torch.randn(count).mul(0.02).bfloat16()
    new = {"near": old * 1.01, "far": torch.randn(count).bfloat16(), "same": old.clone()}[kind]
    one, more = encode_tensor(old, new), encode_tensor(old, new, threads=3)
    assert one.entry == more.entry
    assert torch.equal(one.frames, more.frames)
    for threads in (1, 2, 3):
        assert same_bytes(decode_tensor("t", one, old, threads=threads), new)
    cut = EncodedTensor(one.entry, one.frames[: one.frames.numel() // 2])
    with pytest.raises(ValueError) if kind != "same" else nullcontext():
        decode_tensor("t", cut, old, threads=3)


def test_another_old_tensor_is_named_where_the_new_values_do_not_come_out() -> None:
    old, new = tensors()
    encoded = encode_tensor(old["layer.weight"], new["layer.weight"])
    with pytest.raises(ValueError, match="is not what it was in the anchor"):
        decode_tensor("w", encoded, old["layer.weight"] * 2)
    wrong = replace(encoded.entry, new=encoded.entry.old)
    with pytest.raises(ValueError, match="did not come back"):
        decode_tensor("w", EncodedTensor(wrong, encoded.frames), old["layer.weight"])


def test_another_old_tensor_is_refused_on_demand_where_all_values_are_in_the_frames() -> None:
    old = torch.zeros(300).bfloat16()
    new = torch.randint(-(2**15), 2**15, (300,), dtype=torch.int16).view(torch.bfloat16)
    encoded = encode_tensor(old, new)
    assert encoded.entry.codec == "raw"
    assert same_bytes(decode_tensor("w", encoded, old + 1), new)
    with pytest.raises(ValueError, match="is not what it was in the anchor"):
        decode_tensor("w", encoded, old + 1, verify_old=True)


def test_another_anchor_than_that_of_the_differential_is_refused(tmp_path: Path) -> None:
    old, _ = write(tmp_path / "delta")
    with open_delta(tmp_path / "delta") as delta:
        for name, wrong in (("same", old["same"] + 1), ("layer.bias", old["layer.bias"].half())):
            with pytest.raises(DataLoss, match="the anchor") as caught:
                delta.decode(name, wrong)
            assert caught.value.reason == "SNAPSHOT_CORRUPT"


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Changes the header of safetensors and the description in it."""
    header, body = header_of(path)
    described = json.loads(header["__metadata__"]["tensors"])
    change(header, described)
    header["__metadata__"]["tensors"] = json.dumps(described)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def entry(**values: Any) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda _, described: described["layer.weight"].update(values)


def metadata(**values: str) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda header, _: header["__metadata__"].update(values)


def renamed(name: str) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    def change(header: dict[str, Any], described: dict[str, Any]) -> None:
        header[name] = header.pop("layer.weight")
        described[name] = described.pop("layer.weight")

    return change


def overlapping(header: dict[str, Any], _: dict[str, Any]) -> None:
    header["layer.weight"]["data_offsets"] = header["layer.bias"]["data_offsets"]


def beyond_the_end(header: dict[str, Any], _: dict[str, Any]) -> None:
    header["layer.weight"]["data_offsets"][1] = 2**40
    header["layer.weight"]["shape"] = [2**40]


@pytest.mark.parametrize(
    "change",
    [
        entry(codec="gzip"),
        entry(codec="same"),
        entry(codec="ulp16-zstd"),
        entry(codec=None),
        entry(dtype="float64"),
        entry(dtype="../x"),
        entry(shape=[-1]),
        entry(shape=[2**60]),
        entry(shape=[True]),
        entry(shape="30"),
        entry(old="md5:00"),
        entry(new="xxh3-128:zz"),
        entry(more=1),
        metadata(format="apollo-delta-1"),
        metadata(anchor="../../etc"),
        metadata(anchor=""),
        renamed("../../etc/passwd"),
        renamed("a\x00b"),
        renamed("n" * 501),
        overlapping,
        beyond_the_end,
        lambda header, _: header.pop("same"),
        lambda _, described: described.pop("same"),
        lambda _, described: described.update(stray={}),
        lambda _, described: described.update(same=[]),
    ],
)
def test_a_malformed_description_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]
) -> None:
    path = tmp_path / "delta"
    write(path)
    rewrite(path, change)
    before = path.read_bytes()
    with pytest.raises(DataLoss) as caught, open_delta(path):
        pass
    assert caught.value.reason == "SNAPSHOT_CORRUPT"
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 5000])
def test_a_description_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    meta = {"format": FORMAT, "anchor": ANCHOR, "tensors": text}
    save_file({"a": torch.zeros(1)}, tmp_path / "delta", metadata=meta)
    with pytest.raises(DataLoss), open_delta(tmp_path / "delta"):
        pass


def test_a_shape_that_is_not_the_anchors_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "delta"
    old, _ = write(path)
    rewrite(path, entry(shape=[2**40]))
    with open_delta(path) as delta, pytest.raises(DataLoss, match="another shape"):
        delta.decode("layer.weight", old["layer.weight"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_still_says_the_same(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "delta"
    path.unlink(missing_ok=True)
    old, new = write(path)
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    kept = data.draw(st.sampled_from([start, start + 1, start + 64, len(whole)]))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=64)) + whole[kept:])
    try:
        with open_delta(path) as delta:
            for name in old:
                assert same_bytes(delta.decode(name, old[name]), new[name])
    except (DataLoss, KeyError):
        return
