"""Frames: what was encoded comes back, and anything else is refused within bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apollo_trainer.checkpoints.snapshots import frames
from apollo_trainer.checkpoints.snapshots.frames import CODECS, FRAME

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int16, torch.int64, torch.uint8]


def pair(dtype: torch.dtype, count: int, size: float = 1e-4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(count)
    if not dtype.is_floating_point:
        old = torch.randint(0, 100, (count,), dtype=dtype)
        return old, old + torch.randint(0, 3, (count,), dtype=dtype)
    old = (torch.randn(count) * 0.02).to(dtype)
    return old, (old.float() + torch.randn(count) * size).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, FRAME, FRAME + 3])
def test_a_tensor_comes_back_by_every_codec_that_takes_it(dtype: torch.dtype, count: int) -> None:
    old, new = (frames.words(t) for t in pair(dtype, count))
    for codec in CODECS:
        try:
            frames.require_suitable(codec, dtype)
        except ValueError:
            assert codec.startswith("ulp")
            continue
        if codec == "same":
            continue
        data = b"".join(frames.encode(old, new, codec))
        out = np.empty_like(old)
        frames.decode(memoryview(data), old, codec, out)
        assert np.array_equal(out, new), codec


def test_the_smallest_codec_is_chosen() -> None:
    old, _ = pair(torch.bfloat16, 2**16)
    one_in_a_hundred = old.clone()
    one_in_a_hundred[::100] *= 1.01
    words = frames.words(old)
    assert frames.choose(words, words.copy(), torch.bfloat16) == "same"
    chosen = frames.choose(words, frames.words(one_in_a_hundred), torch.bfloat16)
    assert chosen in ("ulp2-zstd", "ulp4-zstd")
    noise = frames.words(torch.randint(0, 2**15, (2**16,), dtype=torch.int16))
    assert frames.choose(words, noise, torch.bfloat16) == "raw"


def test_a_dense_small_update_takes_an_eighth_of_the_bytes() -> None:
    torch.manual_seed(0)
    old = torch.randn(FRAME).mul(0.02).bfloat16()
    exact = old.float() + torch.randn(FRAME) * 1e-5
    noise = torch.randint(0, 2**16, (FRAME,), dtype=torch.int32)
    new = ((exact.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)
    codec = frames.choose(frames.words(old), frames.words(new), torch.bfloat16)
    size = sum(map(len, frames.encode(frames.words(old), frames.words(new), codec)))
    assert size <= 0.11 * new.nbytes


def test_a_codec_of_another_dtype_is_refused() -> None:
    for codec, dtype in (("ulp8-zstd", torch.int16), ("ulp2-zstd", torch.float32), ("gzip", None)):
        with pytest.raises(ValueError, match="does not exist"):
            frames.require_suitable(codec, dtype or torch.float32)


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "ulp16-zstd"])
@given(data=st.data())
def test_damaged_frames_are_refused_or_decode_to_as_many_elements(
    codec: str, data: st.DataObject
) -> None:
    old, new = (frames.words(t) for t in pair(torch.bfloat16, 300))
    whole = bytearray(b"".join(frames.encode(old, new, codec)))
    cut = data.draw(st.integers(0, len(whole)))
    damaged = bytes(whole[:cut]) + data.draw(st.binary(max_size=8)) + bytes(whole[cut + 1 :])
    out = np.empty_like(old)
    try:
        frames.decode(memoryview(damaged), old, codec, out)
    except ValueError:
        return
    # Nothing but the values may differ: the digest of the tensor finds that.
    assert out.shape == new.shape


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "same"])
def test_a_frame_that_lies_about_its_size_takes_no_memory_for_it(codec: str) -> None:
    old, new = (frames.words(t) for t in pair(torch.float16, 300))
    data = bytearray(b"".join(frames.encode(old, new, codec)))
    for at in (0, 4, 8):
        lying = data.copy()
        lying[at : at + 4] = b"\xff\xff\xff\x7f"
        with pytest.raises(ValueError, match="head does not fit"):
            frames.decode(memoryview(bytes(lying)), old, codec, np.empty_like(old))
