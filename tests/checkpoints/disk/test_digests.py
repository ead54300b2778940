"""Digests: one hash, in the two forms that manifests and snapshots hold on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apollo_trainer.checkpoints.disk.digests import (
    RunningDigest,
    algorithm_of,
    digest,
    file_digest,
    hex_digest,
    matches,
    raw_bytes,
)

# XXH3 of 128 bits of b"abc".
ABC = "06b05ab6733a618578af5f94892f3950"


def test_a_tensor_a_file_and_parts_of_the_same_bytes_have_one_digest(tmp_path: Path) -> None:
    tensor = torch.tensor([*b"abc"], dtype=torch.uint8)
    (tmp_path / "file").write_bytes(b"abc")
    running = RunningDigest()
    for part in (raw_bytes(tensor[:1]), b"b", memoryview(b"c")):
        running.update(part)
    assert running.hex() == hex_digest([b"ab", b"", b"c"]) == ABC
    assert running.value() == digest(tensor) == file_digest(tmp_path / "file") == f"xxh3-128:{ABC}"
    assert matches(tensor, f"xxh3-128:{ABC}")
    assert not matches(tensor + 1, f"xxh3-128:{ABC}")


@pytest.mark.parametrize(
    "text", ["", ABC, f"md5:{ABC}", f"xxh3-128:{ABC[1:]}", f"xxh3-128:{ABC}\n"]
)
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no digest"):
        algorithm_of(text)
