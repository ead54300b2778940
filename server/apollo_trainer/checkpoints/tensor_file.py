"""Writes a safetensors file, with the disk's own errors."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None
) -> None:
    """Writes contiguous tensors, no two of one storage. Raises OSError when the disk refuses.

    safetensors wraps a full disk into an error that is no OSError: whoever handles full disks
    would miss it.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        if not (found := _OS_ERROR.search(str(error))):
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
