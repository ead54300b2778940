"""Runs apollo-torch 1.0.3 and stores the weights that it reaches.

The tests need the numbers only. To make them again, in an environment of its own:

    python -m venv vectors && vectors/bin/pip install torch numpy safetensors
    vectors/bin/pip install --no-deps apollo-torch==1.0.3
    vectors/bin/python tests/data/apollo_torch/make_vectors.py

apollo-torch imports transformers and bitsandbytes, which its APOLLO path does not use; empty
modules stand in for them.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock

import torch
from gradients import CASES, CHECKPOINTS, OPTIONS, REFRESH, SHAPES, STEPS, gradient, weight
from safetensors.torch import save_file

_UNUSED = (
    "transformers", "transformers.utils", "transformers.utils.versions", "bitsandbytes",
    "bitsandbytes.functional", "bitsandbytes.optim", "bitsandbytes.optim.optimizer",
)  # fmt: skip


def published_optimizer() -> type[torch.optim.Optimizer]:
    """apollo-torch's APOLLO, imported over stand-ins for what it does not use."""
    for name in _UNUSED:
        sys.modules[name] = MagicMock()
    sys.modules["bitsandbytes.optim.optimizer"].Optimizer2State = object
    sys.modules["transformers.utils.versions"].require_version = lambda _: None
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW


def run(optimizer_class: type[torch.optim.Optimizer], case: str) -> dict[str, torch.Tensor]:
    """The weights of every parameter at every checkpoint."""
    scale_type, rank, scale = CASES[case]
    params = {n: torch.nn.Parameter(torch.from_numpy(weight(n))) for n in SHAPES}
    low_rank = {
        "rank": rank, "update_proj_gap": REFRESH, "scale": scale, "scale_type": scale_type,
        "proj": "random", "proj_type": "std",
    }  # fmt: skip
    matrices = [p for p in params.values() if p.ndim == 2]
    groups = [{"params": matrices, **low_rank}, {"params": [params["bias"]]}]
    optimizer = optimizer_class(groups, **OPTIONS)
    stored = {}
    for step in range(1, STEPS + 1):
        for name, p in params.items():
            p.grad = torch.from_numpy(gradient(name, step))
        optimizer.step()
        if step in CHECKPOINTS:
            stored |= {f"{case}.{n}.{step}": p.detach().clone() for n, p in params.items()}
    return stored


def main() -> None:
    """Writes vectors.safetensors beside this file."""
    optimizer_class = published_optimizer()
    tensors = {}
    for case in CASES:
        tensors |= run(optimizer_class, case)
    made_by = {"apollo-torch": version("apollo-torch"), "torch": str(torch.__version__)}
    save_file(tensors, Path(__file__).with_name("vectors.safetensors"), metadata=made_by)


if __name__ == "__main__":
    main()
