"""What bfloat16 weights keep of updates that are smaller than their spacing."""

import pytest
import torch
from torch import nn

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.rounding import join_halves

STEPS, SHAPE = 100, (64, 256)


def _random(seed, scale=1.0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * scale


def _moved(dtype, rounding="stochastic", lr=1e-5, weight_decay=0.0, zero=False):
    start = _random(0, 0.02).bfloat16()
    p = nn.Parameter(start.to(dtype, copy=True))
    options = {"lr": lr, "rank": 16, "rounding": rounding, "weight_decay": weight_decay}
    optimizer = Apollo([("w", p)], **options)
    steady = _random(1)
    for step in range(STEPS):
        p.grad = (steady + _random(2 + step)).mul_(0.0 if zero else 1.0).to(dtype)
        optimizer.step()
    stored = p.detach()
    exact = join_halves(stored, optimizer.state[p]["low"]) if rounding == "split16" else stored
    return exact.float() - start.float()


def _kept(moved, intended):
    return float((moved * intended).sum() / intended.square().sum())


def test_stochastic_rounding_keeps_the_movement_that_nearest_loses():
    intended = _moved(torch.float32)
    assert _kept(_moved(torch.bfloat16), intended) == pytest.approx(1.0, abs=0.05)
    assert _kept(_moved(torch.bfloat16, "nearest"), intended) < 0.3
    split = _moved(torch.bfloat16, "split16")
    assert (split - intended).norm() / intended.norm() < 0.1


def test_stochastic_rounding_keeps_the_decay_that_nearest_loses():
    start = _random(0, 0.02).bfloat16().float()
    for rounding, kept in (("stochastic", 1.0), ("nearest", 0.0)):
        moved = _moved(torch.bfloat16, rounding, lr=1e-4, weight_decay=0.1, zero=True)
        intended = start * ((1 - 1e-5) ** STEPS - 1)
        assert _kept(moved, intended) == pytest.approx(kept, abs=0.1)


def test_split16_is_an_exact_float32_master():
    start = _random(0, 0.02).bfloat16()
    exact, split = nn.Parameter(start.float()), nn.Parameter(start.clone())
    ours = Apollo([("w", exact)], lr=1e-5, rank=16)
    halves = Apollo([("w", split)], lr=1e-5, rank=16, rounding="split16")
    for step in range(20):
        grad = _random(step).bfloat16()
        exact.grad, split.grad = grad.float(), grad
        ours.step()
        halves.step()
    assert torch.equal(join_halves(split.detach(), halves.state[split]["low"]), exact)
    nearest = exact.detach().bfloat16().float()
    assert ((split.float() - exact).abs() <= (nearest - exact).abs()).all()
