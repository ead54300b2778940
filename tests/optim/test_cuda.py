"""The fused path against the reference path: the same step, launched otherwise.

Needs a CUDA device; with TRITON_INTERPRET=1 and Triton installed it runs, slowly, without one.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.cuda import tables

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"
)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SHAPES = {
    "tall": (96, 40),
    "wide": (40, 136),
    "square": (64, 64),
    "odd": (37, 83),
    "stack": (3, 48, 24),
    "vector": (75,),
    "small": (4, 200),
}


def gradients(shapes, dtype, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {n: torch.randn(s, generator=generator).mul(0.1).to(dtype) for n, s in shapes.items()}
        for _ in range(steps)
    ]


def run(impl, shapes, grads, dtype=torch.bfloat16, view=None, **options):
    """Weights, in float32, and the optimizer, after the given gradients."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator).mul(0.02).to(dtype).to(DEVICE)
        weights[name] = view(weight) if view else weight
    settings = {"lr": 1e-2, "rank": 16, "proj_refresh": 3, "weight_decay": 0.1} | options
    optimizer = Apollo(weights.items(), impl=impl, **settings)
    optimizer.measure = True
    for step in grads:
        for name, weight in weights.items():
            weight.grad = step[name].to(DEVICE)
        optimizer.step()
    return {n: w.float().cpu() for n, w in weights.items()}, optimizer


def ulps(a, b):
    """Distance in bfloat16 numbers."""
    ordered = []
    for t in (a, b):
        bits = t.to(torch.bfloat16).view(torch.int16).int()
        ordered.append(torch.where(bits < 0, -32768 - bits, bits))
    return int((ordered[0] - ordered[1]).abs().max())


@pytest.mark.parametrize("variant", ["channel", "mini"])
@pytest.mark.parametrize("rank", [1, 16, 20])
def test_float32_weights_agree_to_rounding_error(variant, rank):
    grads = gradients(SHAPES, torch.float32, 7)
    fused, _ = run("fused", SHAPES, grads, torch.float32, variant=variant, rank=rank)
    reference, _ = run("reference", SHAPES, grads, torch.float32, variant=variant, rank=rank)
    for name in SHAPES:
        # With rank 1 a channel's factor has no bound; its rounding error grows with it.
        largest = float(reference[name].abs().max())
        assert (fused[name] - reference[name]).abs().max() < 1e-4 * largest, name


@pytest.mark.parametrize("rounding", ["nearest", "split16"])
def test_bfloat16_weights_agree_to_one_number(rounding):
    grads = gradients(SHAPES, torch.bfloat16, 5)
    fused, _ = run("fused", SHAPES, grads, rounding=rounding)
    reference, _ = run("reference", SHAPES, grads, rounding=rounding)
    for name in SHAPES:
        assert ulps(fused[name], reference[name]) <= 1, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rank", [64, 100, 256, 300])
def test_wide_projections_agree_to_one_number(rank):
    shapes = {"tall": (1032, 512), "wide": (320, 776), "square": (512, 512), "stack": (2, 328, 640)}
    grads = gradients(shapes, torch.bfloat16, 3)
    options = {"rank": rank, "rounding": "nearest", "lr": 1e-3}
    # One step from the same weights: a number that rounds otherwise would stay apart for good.
    before, optimizer = run("reference", shapes, grads[:2], **options)
    after = {}
    for impl in ("fused", "reference"):
        weights = {n: w.bfloat16().to(DEVICE) for n, w in before.items()}
        resumed = Apollo(weights.items(), impl=impl, proj_refresh=3, weight_decay=0.1, **options)
        resumed.load_named_state(*optimizer.named_state())
        for name, weight in weights.items():
            weight.grad = grads[2][name].to(DEVICE)
        resumed.step()
        after[impl] = {n: w.float().cpu() for n, w in weights.items()}
    for name in shapes:
        # Weights that the step carried across zero are held to the spacing of numbers as large
        # as the step: their own is below the rounding of float32 sums.
        largest = after["reference"][name].abs().clamp(min=1e-3)
        spacing = torch.exp2(largest.log2().floor() - 7)
        apart = (after["fused"][name] - after["reference"][name]).abs()
        assert (apart <= spacing).all(), name
        assert (apart > 0).float().mean() < 1e-3, name


def test_many_waves_leave_the_same_bits_as_one(monkeypatch):
    shapes = {f"{kind}{i}": shape for i in range(3) for kind, shape in SHAPES.items()}
    grads = gradients(shapes, torch.float32, 4)
    one, _ = run("fused", shapes, grads, torch.float32)
    monkeypatch.setattr(tables, "WAVE_BYTES", 1)
    many, _ = run("fused", shapes, grads, torch.float32)
    for name in shapes:
        assert torch.equal(one[name], many[name]), name


def test_stochastic_rounding_draws_the_same_bits():
    # With a gradient of zero both paths round the same exact number, W (1 - lr lambda).
    zero = [{n: torch.zeros(s, dtype=torch.bfloat16) for n, s in SHAPES.items()}] * 3
    shapes = {n: s for n, s in SHAPES.items() if n != "stack"}
    fused, _ = run("fused", shapes, zero)
    reference, _ = run("reference", shapes, zero)
    before, _ = run("reference", shapes, [])
    for name in shapes:
        assert torch.equal(fused[name], reference[name]), name
        assert not torch.equal(fused[name], before[name]), name


def test_stochastic_rounding_of_real_steps_differs_in_a_handful_of_draws():
    grads = gradients(SHAPES, torch.bfloat16, 1)
    fused, _ = run("fused", SHAPES, grads)
    reference, _ = run("reference", SHAPES, grads)
    for name in SHAPES:
        assert ulps(fused[name], reference[name]) <= 1
        assert (fused[name] != reference[name]).float().mean() < 0.01, name


@pytest.mark.parametrize("lay", [lambda w: w, lambda w: w.mT.contiguous().mT], ids=["rows", "cols"])
def test_strided_views_are_stepped_in_place_and_nothing_beside_them(lay):
    shapes = {"q": (48, 40), "k": (24, 40)}
    grads = gradients(shapes, torch.bfloat16, 3)
    holders = []

    def view(weight):
        holder = lay(torch.full((weight.shape[0] + 16, 56), 7.0, dtype=weight.dtype, device=DEVICE))
        holders.append(holder)
        part = holder[8:-8, 8:-8]
        part.copy_(weight)
        return part

    fused, _ = run("fused", shapes, grads, view=view, rounding="nearest")
    plain, _ = run("fused", shapes, grads, rounding="nearest")
    for name in shapes:
        assert torch.equal(fused[name], plain[name])
    for holder in holders:
        assert (holder[:8] == 7).all() and (holder[-8:] == 7).all()
        assert (holder[:, :8] == 7).all() and (holder[:, -8:] == 7).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_the_others_step(value):
    grads = gradients(SHAPES, torch.bfloat16, 3)
    clean = [dict(step) for step in grads]
    for name in ("wide", "vector"):
        grads[1][name] = grads[1][name].clone()
        grads[1][name].view(-1)[5] = value
    fused, optimizer = run("fused", SHAPES, grads)
    reference, _ = run("reference", SHAPES, grads)
    others, _ = run("fused", SHAPES, clean)
    assert optimizer.skipped_nonfinite == 2
    for name in SHAPES:
        assert fused[name].isfinite().all()
        assert ulps(fused[name], reference[name]) <= 1
        if name not in ("wide", "vector"):
            assert torch.equal(fused[name], others[name])


def test_a_zero_gradient_does_not_freeze_a_matrix():
    shapes = {"tall": SHAPES["tall"]}
    grads = gradients(shapes, torch.float32, 6)
    grads[3] = {"tall": torch.zeros(SHAPES["tall"])}
    with_zero, _ = run("fused", shapes, grads, torch.float32, weight_decay=0.0)
    before, _ = run("fused", shapes, grads[:4], torch.float32, weight_decay=0.0)
    usual, _ = run("fused", shapes, grads[:3], torch.float32, weight_decay=0.0)
    earlier, _ = run("fused", shapes, grads[:2], torch.float32, weight_decay=0.0)
    after, _ = run("fused", shapes, grads[:5], torch.float32, weight_decay=0.0)
    step_after = (after["tall"] - before["tall"]).norm()
    assert step_after > 0.5 * (usual["tall"] - earlier["tall"]).norm()
    assert with_zero["tall"].isfinite().all()


def test_an_expert_without_a_gradient_is_left_alone():
    shapes = {"stack": SHAPES["stack"]}
    grads = gradients(shapes, torch.bfloat16, 2)
    for step in grads:
        step["stack"][1] = 0
    fused, optimizer = run("fused", shapes, grads)
    before, _ = run("fused", shapes, [])
    assert torch.equal(fused["stack"][1], before["stack"][1])
    assert not torch.equal(fused["stack"][0], before["stack"][0])
    assert optimizer.skipped_nonfinite == 0


def test_what_is_measured_agrees():
    grads = gradients(SHAPES, torch.bfloat16, 2)
    _, fused = run("fused", SHAPES, grads, rounding="nearest")
    _, reference = run("reference", SHAPES, grads, rounding="nearest")
    assert float(fused.last_update_norm) == pytest.approx(float(reference.last_update_norm), 1e-3)
    assert float(fused.last_changed_fraction) == pytest.approx(
        float(reference.last_changed_fraction), 1e-2
    )


def test_a_state_resumes_on_the_other_path():
    grads = gradients(SHAPES, torch.float32, 6)
    whole, _ = run("fused", SHAPES, grads, torch.float32)
    half, optimizer = run("reference", SHAPES, grads[:3], torch.float32)
    weights = {n: w.to(DEVICE) for n, w in half.items()}
    resumed = Apollo(
        weights.items(), lr=1e-2, rank=16, proj_refresh=3, weight_decay=0.1, impl="fused"
    )
    resumed.load_named_state(*optimizer.named_state())
    for step in grads[3:]:
        for name, weight in weights.items():
            weight.grad = step[name].to(DEVICE)
        resumed.step()
    for name in SHAPES:
        assert torch.allclose(weights[name].cpu(), whole[name], rtol=1e-4, atol=3e-6), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_replays_as_if_it_were_called():
    grads = gradients(SHAPES, torch.bfloat16, 1)[0]
    results = {}
    for captured in (False, True):
        generator = torch.Generator().manual_seed(1)
        weights = {
            n: torch.randn(s, generator=generator).mul(0.02).bfloat16().cuda()
            for n, s in SHAPES.items()
        }
        optimizer = Apollo(weights.items(), lr=1e-2, rank=16, proj_refresh=3, impl="fused")
        for name, weight in weights.items():
            weight.grad = grads[name].cuda()
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                optimizer.step()
        for _ in range(5):
            graph.replay() if captured else optimizer.step()
        results[captured] = {n: w.float().cpu() for n, w in weights.items()}
    for name in SHAPES:
        assert torch.equal(results[True][name], results[False][name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_elements_beyond_two_to_the_31_are_reached():
    rows = 2**31 // 8192 + 8
    weight = torch.zeros(rows, 8192, dtype=torch.bfloat16, device=DEVICE)
    weight.grad = torch.full_like(weight, 1e-3)
    Apollo([("w", weight)], lr=1e-2, rank=16, impl="fused", rounding="nearest").step()
    assert (weight[-1] != 0).all() and (weight[0] != 0).all()
    assert torch.equal(weight[0], weight[-1]), "every channel has the same gradient"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_waits_for_nothing():
    weights = {n: torch.zeros(s, device=DEVICE) for n, s in SHAPES.items()}
    optimizer = Apollo(weights.items(), rank=16, impl="fused")
    for name, weight in weights.items():
        weight.grad = torch.ones(SHAPES[name], device=DEVICE)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
