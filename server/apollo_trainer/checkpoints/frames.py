"""One tensor as a row of compressed frames, each bounded, by the codec that suits it.

A frame holds FRAME elements, the last one the rest: 12 bytes (elements, escapes, bytes of the body;
uint32 each, little-endian), then the body. Codecs:

- `same`: no frame, the old bytes.
- `raw`: the new bytes.
- `xor-zstd`: new ^ old in planes of bytes, then zstd. Any dtype.
- `ulp<w>-zstd`: differences of w bits (ulp_codec.py) and the escapes, then zstd. Floats alone.

zstd's level is 1: higher ones take longer and save less than half a percent.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from apollo_trainer.checkpoints import ulp_codec
from apollo_trainer.checkpoints.digest import raw_bytes

Array = NDArray[Any]

FRAME = 2**18  # elements
_HEAD = struct.Struct("<III")
_LEVEL = 1
_WORDS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_WIDTHS = {"ulp2-zstd": 2, "ulp4-zstd": 4, "ulp8-zstd": 8, "ulp16-zstd": 16}
_SUITED: dict[torch.dtype, tuple[str, ...]] = {
    torch.bfloat16: ("ulp2-zstd", "ulp4-zstd", "ulp8-zstd"),
    torch.float16: ("ulp2-zstd", "ulp4-zstd", "ulp8-zstd", "ulp16-zstd"),
    torch.float32: ("ulp8-zstd", "ulp16-zstd", "xor-zstd"),
}
CODECS = ("same", "raw", "xor-zstd", *_WIDTHS)


def words(tensor: torch.Tensor) -> Array:
    """The bit patterns in row-major order, flat; shares the memory of a contiguous CPU tensor."""
    return raw_bytes(tensor).view(_WORDS[tensor.element_size()])


def choose(old: Array, new: Array, dtype: torch.dtype) -> str:
    """The codec whose frame in the middle is the smallest."""
    if np.array_equal(old, new):
        return "same"
    start = max(0, (new.size - FRAME) // 2)
    part = slice(start, start + FRAME)
    sizes = {
        codec: len(_encode_frame(old[part], new[part], codec))
        for codec in (*_SUITED.get(dtype, ("xor-zstd",)), "raw")
    }
    return min(sizes, key=lambda codec: sizes[codec])


def encode(old: Array, new: Array, codec: str) -> Iterator[bytes]:
    """The frames that take `old` to `new`: flat words of one size and number."""
    if codec == "same":
        return
    for start in range(0, new.size, FRAME):
        part = slice(start, start + FRAME)
        yield _encode_frame(old[part], new[part], codec)


def _encode_frame(old: Array, new: Array, codec: str) -> bytes:
    escapes = 0
    if codec == "raw":
        body = new.tobytes()
    elif codec == "xor-zstd":
        planes = (new ^ old).view(np.uint8).reshape(-1, new.itemsize).T
        body = _compress(planes.tobytes())
    else:
        width = _WIDTHS[codec]
        steps, patterns = ulp_codec.difference(old, new, width)
        escapes = patterns.size
        body = _compress(ulp_codec.pack(steps, width).tobytes() + patterns.tobytes())
    return _HEAD.pack(new.size, escapes, len(body)) + body


def _compress(data: bytes) -> bytes:
    # A new one each time: a compressor is not safe for two threads, and costs microseconds.
    return zstandard.ZstdCompressor(level=_LEVEL).compress(data)


def decode(frames: memoryview, old: Array, codec: str, out: Array) -> None:
    """Writes the new words; `out` may be `old`.

    Raises ValueError where the frames are not exactly those of so many elements. What is written
    then is of no use, and no memory beyond one frame's was taken.
    """
    if codec == "same":
        if len(frames):
            raise ValueError("there are frames where nothing changed")
        out[...] = old
        return
    at = 0
    for start in range(0, out.size, FRAME):
        part = slice(start, min(start + FRAME, out.size))
        if len(frames) - at < _HEAD.size:
            raise ValueError("a frame is missing")
        count, escapes, size = _HEAD.unpack_from(frames, at)
        at += _HEAD.size
        if count != part.stop - start or escapes > count or size > len(frames) - at:
            raise ValueError("a frame's head does not fit")
        _decode_frame(frames[at : at + size], escapes, old[part], codec, out[part])
        at += size
    if at != len(frames):
        raise ValueError("there are bytes after the last frame")


def _decode_frame(body: memoryview, escapes: int, old: Array, codec: str, out: Array) -> None:
    if codec.startswith("ulp"):
        width = _WIDTHS[codec]
        packed = ulp_codec.packed_size(out.size, width)
        data = _decompress(body, packed + escapes * out.itemsize)
        steps = ulp_codec.unpack(data[:packed], out.size, width)
        # A copy: after an odd number of bytes the patterns are not aligned.
        patterns = np.frombuffer(data[packed:].tobytes(), out.dtype)
        ulp_codec.apply(old, steps, patterns, width, out)
        return
    if escapes:
        raise ValueError("a frame's head does not fit")
    if codec == "xor-zstd":
        planes = _decompress(body, out.nbytes).reshape(out.itemsize, -1)
        out[...] = np.ascontiguousarray(planes.T).reshape(-1).view(out.dtype) ^ old
        return
    if len(body) != out.nbytes:
        raise ValueError("a frame's body has another size than its elements")
    out[...] = np.frombuffer(body, out.dtype)


def _decompress(body: memoryview, size: int) -> NDArray[np.uint8]:
    """Exactly `size` bytes. Raises ValueError for any other, before memory is taken for it."""
    try:
        if zstandard.frame_content_size(body) != size:
            raise ValueError("a frame's body has another size than its elements")
        data = zstandard.ZstdDecompressor().decompress(
            body, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ValueError(f"a frame cannot be decompressed ({error})") from error
    if len(data) != size:
        raise ValueError("a frame's body has another size than its elements")
    return np.frombuffer(data, np.uint8)


def require_suitable(codec: str, dtype: torch.dtype) -> None:
    """Raises ValueError unless the codec exists and takes tensors of this dtype."""
    if codec not in CODECS or (codec in _WIDTHS and codec not in _SUITED.get(dtype, ())):
        raise ValueError(f"the codec {codec[:40]!r} does not exist for {dtype}")
