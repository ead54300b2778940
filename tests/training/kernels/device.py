"""Where kernels are tried: on a GPU, or by Triton's interpreter with TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
NOISE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = [torch.float32] if INTERPRETED else list(NOISE)
needs_device = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device"
)
