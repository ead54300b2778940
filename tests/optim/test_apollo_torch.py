"""compat='apollo-torch' against weights that apollo-torch 1.0.3 reached."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apollo_trainer.optim import Apollo

FOLDER = Path(__file__).parents[1] / "data" / "apollo_torch"
RECIPE = runpy.run_path(str(FOLDER / "gradients.py"))
VECTORS = load_file(FOLDER / "vectors.safetensors")
TOLERANCE = 1e-6


def _optimizer(params: dict[str, torch.nn.Parameter], case: str) -> Apollo:
    scale_type, rank, scale = RECIPE["CASES"][case]
    matrices = [item for item in params.items() if item[1].ndim == 2]
    return Apollo(
        [{"params": matrices}, {"params": [("bias", params["bias"])], "rank": None}],
        rank=rank,
        scale=math.sqrt(scale),
        proj_refresh=RECIPE["REFRESH"],
        variant={"channel": "channel", "tensor": "mini"}[scale_type],
        compat="apollo-torch",
        **RECIPE["OPTIONS"],
    )


@pytest.mark.parametrize("case", ["channel", "mini"])
def test_reaches_the_published_weights(case):
    names = list(RECIPE["SHAPES"])
    params = {n: torch.nn.Parameter(torch.from_numpy(RECIPE["weight"](n))) for n in names}
    start = {n: p.detach().clone() for n, p in params.items()}
    optimizer = _optimizer(params, case)
    compared = 0
    for step in range(1, RECIPE["STEPS"] + 1):
        for name, p in params.items():
            p.grad = torch.from_numpy(RECIPE["gradient"](name, step))
        optimizer.step()
        for name, p in params.items():
            if f"{case}.{name}.{step}" in VECTORS:
                worst = (p.detach() - VECTORS[f"{case}.{name}.{step}"]).abs().max()
                assert worst <= TOLERANCE, f"{name} at step {step}"
                compared += 1
    assert compared == len(names) * len(RECIPE["CHECKPOINTS"])
    assert all((p - start[n]).abs().max() > 1e-2 for n, p in params.items())


def test_the_published_limiter_stalls_after_a_zero_gradient():
    moved = VECTORS["channel.stalled.100"] - VECTORS["channel.stalled.60"]
    usual = VECTORS["channel.stalled.40"] - VECTORS["channel.stalled.21"]
    decayed = VECTORS["channel.stalled.60"] * ((1 - 1e-3) ** 40 - 1)
    assert (moved - decayed).norm() < 1e-3 * usual.norm()
