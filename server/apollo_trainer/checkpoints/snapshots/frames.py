"""A tensor as a row of compressed frames of bounded size, by the codec that suits it.

A frame holds FRAME elements, the last one the rest: a head of 20 bytes (elements, near escapes, far
escapes, bytes of the body, bytes of the compressed escapes; uint32 each, little-endian), the body,
and the escapes. Codecs:

- `same`: no frame, the old bytes.
- `raw`: the new bytes.
- `xor-zstd`: new ^ old in planes of bytes, then zstd. Any dtype.
- `ulp<w>-zstd`: differences of w bits, zstd; near and far escapes (ulp_codec.py), zstd. Floats
  alone. Escapes are distributed otherwise: compressed with the differences they take a tenth more.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from apollo_trainer.checkpoints.disk import raw_bytes
from apollo_trainer.checkpoints.snapshots import ulp_codec

Array = NDArray[Any]
log = logging.getLogger(__name__)

FRAME = 2**18  # elements
SAMPLE, SAMPLES = 2**13, 4  # elements that a codec is chosen by, and how often
_HEAD = struct.Struct("<IIIII")
_WIDTHS = {"ulp2-zstd": 2, "ulp4-zstd": 4, "ulp8-zstd": 8, "ulp16-zstd": 16}
# The fastest to decode first: a slower one must be smaller by more than _HARDLY.
_SUITED: dict[torch.dtype, tuple[str, ...]] = {
    torch.bfloat16: ("ulp8-zstd", "ulp4-zstd", "ulp2-zstd"),
    torch.float16: ("ulp16-zstd", "ulp8-zstd", "ulp4-zstd", "ulp2-zstd"),
    torch.float32: ("xor-zstd", "ulp16-zstd", "ulp8-zstd"),
}
_HARDLY = 1.02
CODECS = ("same", "raw", "xor-zstd", *_WIDTHS)
# Below so many elements numpy is as fast, and nothing need be compiled.
_FEW = 2**16


class _Own(threading.local):
    """What each thread uses again for every frame; no two threads may share it."""

    def __init__(self) -> None:
        # Differences hardly repeat: a search for matches costs more time than it saves bytes.
        entropy = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST, window_log=19, hash_log=6, min_match=7
        )
        self.entropy = zstandard.ZstdCompressor(compression_params=entropy)
        # Higher levels take longer and save less than half a percent.
        self.general = zstandard.ZstdCompressor(level=1)
        self.decompressor = zstandard.ZstdDecompressor()
        self._memory: dict[Any, Array] = {}

    def memory(self, key: str, count: int, dtype: Any) -> Array:
        """The same memory at every call: fresh memory would cost many times the work in it."""
        kept = self._memory.get((key, dtype))
        if kept is None or kept.size < count:
            kept = self._memory[key, dtype] = np.empty(max(count, FRAME), dtype)
        return kept[:count]


_own = _Own()


@lru_cache(maxsize=1)
def _loops() -> ModuleType | None:
    """The compiled loops; None without numba, which is imported when they are needed."""
    try:
        from apollo_trainer.checkpoints.snapshots import ulp_loops
    except ImportError as error:
        # A numba that is too old for numpy raises this too.
        log.warning(
            "Without numba (%s) snapshots, undo and restore take several times as long; install a "
            "numba and a numpy that go together.",
            error,
        )
        return None
    return ulp_loops


def words(tensor: torch.Tensor) -> Array:
    """The bit patterns in row-major order, flat; shares the memory of a contiguous CPU tensor."""
    return raw_bytes(tensor).view(f"u{tensor.element_size()}")


def choose(old: Array, new: Array, dtype: torch.dtype) -> str:
    """The fastest codec of those by which samples of the tensor are about the smallest."""
    if _same(old, new):
        return "same"
    a, b = _sampled(old), _sampled(new)
    candidates = (*_SUITED.get(dtype, ("xor-zstd",)), "raw")
    sizes = {codec: sum(map(len, encode(a, b, codec))) for codec in candidates}
    most = _HARDLY * min(sizes.values())
    return "raw" if sizes["raw"] <= most else next(c for c in candidates if sizes[c] <= most)


def _same(old: Array, new: Array) -> bool:
    """Compares frame by frame: mostly the first one differs already."""
    return all(
        np.array_equal(old[start : start + FRAME], new[start : start + FRAME])
        for start in range(0, new.size, FRAME)
    )


def _sampled(words: Array) -> Array:
    if words.size <= SAMPLE * SAMPLES:
        return words
    step = (words.size - SAMPLE) // (SAMPLES - 1)
    return np.concatenate([words[n * step : n * step + SAMPLE] for n in range(SAMPLES)])


def parts(count: int, threads: int) -> list[slice]:
    """Divides the elements into at most so many parts of whole frames, one part a thread."""
    frames = -(-count // FRAME)
    step = FRAME * max(1, -(-frames // threads))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def split(frames: memoryview, codec: str, parts: list[slice]) -> list[memoryview]:
    """The frames of each part. Raises ValueError where there are not as many."""
    if codec == "same":
        return [frames] * len(parts)
    found, at = [], 0
    for part in parts:
        start = at
        for _ in range(part.start, part.stop, FRAME):
            if len(frames) - at < _HEAD.size:
                raise ValueError("a frame is missing")
            _, _, _, size, more = _HEAD.unpack_from(frames, at)
            at += _HEAD.size + size + more
        found.append(frames[start:at])
    if at != len(frames):
        raise ValueError("the frames do not end where the file does")
    return found


def encode(old: Array, new: Array, codec: str) -> Iterator[bytes]:
    """The frames that take `old` to `new`, in pieces: flat words of one size and number."""
    if codec == "same":
        return
    for start in range(0, new.size, FRAME):
        part = slice(start, start + FRAME)
        yield from _encode_frame(old[part], new[part], codec)


def _encode_frame(old: Array, new: Array, codec: str) -> tuple[bytes, ...]:
    near = far = np.empty(0, np.int8)
    if codec == "raw":
        body = new.tobytes()
    elif codec == "xor-zstd":
        planes = (new ^ old).view(np.uint8).reshape(-1, new.itemsize).T
        body = _own.general.compress(planes.tobytes())
    else:
        packed, near, far = _differences(old, new, _WIDTHS[codec])
        body = _own.entropy.compress(packed.data)
    escapes = b""
    if near.size or far.size:
        escapes = _own.entropy.compress(near.tobytes() + far.tobytes())
    return _HEAD.pack(new.size, near.size, far.size, len(body), len(escapes)), body, escapes


def _differences(old: Array, new: Array, width: int) -> tuple[Array, Array, Array]:
    """As `ulp_codec.encode`; the next call on this thread overwrites the result."""
    loops = _loops() if old.size >= _FEW else None
    if loops is None:
        return ulp_codec.encode(old, new, width)
    packed = _own.memory("packed", ulp_codec.packed_size(new.size, width), np.uint8)
    near = _own.memory("near", new.size, np.int8)
    far = _own.memory("far", new.size, new.dtype)
    if width == 16:
        return packed, near[:0], far[: loops.encode_16(old, new, packed, far)]
    nears, fars = loops.encode(old, new, width, packed, near, far)
    return packed, near[:nears], far[:fars]


def decode(
    frames: memoryview,
    old: Array,
    codec: str,
    out: Array,
    written: Callable[[Array], object] = lambda part: None,
) -> None:
    """Writes the new words; `out` may be `old`.

    Args:
        written: is called with each part of `out`, in order, while it is in the core's cache.

    Raises ValueError where the frames are not exactly those of so many elements; `out` is undefined
    then. No more memory than one frame's is allocated.
    """
    if codec == "same" and len(frames):
        raise ValueError("there are frames where nothing changed")
    at = 0
    for start in range(0, out.size, FRAME):
        part = slice(start, min(start + FRAME, out.size))
        if codec == "same":
            out[part] = old[part]
        else:
            at += _decode_frame(frames[at:], old[part], codec, out[part])
        written(out[part])
    if at != len(frames):
        raise ValueError("there are bytes after the last frame")


def _decode_frame(frames: memoryview, old: Array, codec: str, out: Array) -> int:
    """Writes the words of the first frame; returns its bytes."""
    if len(frames) < _HEAD.size:
        raise ValueError("a frame is missing")
    count, nears, fars, size, more = _HEAD.unpack_from(frames)
    end, width = int(_HEAD.size + size), _WIDTHS.get(codec, 0)
    most_nears = count if 0 < width < ulp_codec.NEAR else 0
    fit = count == out.size and nears <= most_nears and fars <= (count if width else 0)
    if not fit or size + more > len(frames) - _HEAD.size or (more and not (nears or fars)):
        raise ValueError("a frame's head does not fit")
    body = frames[_HEAD.size : end]
    if width:
        packed = _decompress(body, ulp_codec.packed_size(count, width))
        escapes = _decompress(frames[end : end + more], nears + fars * out.itemsize)
        _apply(old, packed, escapes[:nears], escapes[nears:], width, out)
    elif codec == "xor-zstd":
        planes = np.frombuffer(_decompress(body, out.nbytes), np.uint8).reshape(out.itemsize, -1)
        out[...] = np.ascontiguousarray(planes.T).reshape(-1).view(out.dtype) ^ old
    else:
        if len(body) != out.nbytes:
            raise ValueError("a frame's body has another size than its elements")
        out[...] = np.frombuffer(body, out.dtype)
    return end + int(more)


def _apply(old: Array, packed: bytes, near: bytes, far: bytes, width: int, out: Array) -> None:
    steps, nears = np.frombuffer(packed, np.uint8), np.frombuffer(near, np.int8)
    fars = np.frombuffer(far, out.dtype)
    loops = _loops() if old.size >= _FEW else None
    if loops is None:
        ulp_codec.decode(old, steps, nears, fars, width, out)
        return
    if width == 16:
        marked = (0, loops.decode_16(old, steps, fars, out))
    else:
        marked = loops.decode(old, steps, nears, fars, width, out)
    if marked != (nears.size, fars.size):
        raise ValueError(f"{marked} marks, and {(nears.size, fars.size)} escapes")


def _decompress(body: memoryview, size: int) -> bytes:
    """Exactly `size` bytes. Raises ValueError for any other size, before memory is allocated."""
    if not size and not len(body):
        return b""
    try:
        if zstandard.frame_content_size(body) != size:
            raise ValueError("a frame's body has another size than its elements")
        data: bytes = _own.decompressor.decompress(
            body, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ValueError(f"a frame cannot be decompressed ({error})") from error
    if len(data) != size:
        raise ValueError("a frame's body has another size than its elements")
    return data


def require_suitable(codec: str, dtype: torch.dtype) -> None:
    """Raises ValueError unless the codec exists and takes tensors of this dtype."""
    if codec not in CODECS or (codec in _WIDTHS and codec not in _SUITED.get(dtype, ())):
        raise ValueError(f"the codec {codec[:40]!r} does not exist for {dtype}")
