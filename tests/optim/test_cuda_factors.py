"""The fused path on gradients that are factors, against the reference path on their product.

Needs a CUDA device; with TRITON_INTERPRET=1 and Triton installed what is in float32 runs, slowly,
without one.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import pytest
import torch

from apollo_grpc.region import Region
from apollo_trainer.optim.change import Change
from apollo_trainer.optim.cuda import FusedStepper, Work, fits, tables
from apollo_trainer.optim.factored import Factored
from apollo_trainer.optim.options import NO_SCHEDULE, settings_for
from apollo_trainer.optim.parameters import Slot, new_state
from apollo_trainer.optim.reference import Job, step_parameter
from apollo_trainer.optim.rounding import Rounding

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CUDA = torch.cuda.is_available() and not INTERPRETED
pytestmark = pytest.mark.skipif(not (ON_CUDA or INTERPRETED), reason="needs a CUDA device")
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
# The interpreter's products of bfloat16 are wrong, and it rounds to bfloat16 by cutting off.
DTYPES = [
    pytest.param(torch.bfloat16, id="bfloat16", marks=needs_cuda),
    pytest.param(torch.float32, id="float32"),
]
ROUNDINGS = ["stochastic", "split16", pytest.param("nearest", marks=needs_cuda)]
TOKENS = [1, 7, 40, pytest.param(200, marks=needs_cuda), pytest.param(700, marks=needs_cuda)]
SHAPES = {
    "tall": (136, 72),
    "wide": (72, 200),
    "square": (64, 64),
    "odd tall": (83, 37),
    "odd wide": (36, 141),
}
OPTIONS = {
    "lr": 1e-2, "rank": 4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1,
    "warmup_steps": 0, "warmup_from": 0, "scale": None, "proj_refresh": 3,
    "norm_growth_limit": 1.01, **NO_SCHEDULE,
}  # fmt: skip


@dataclass
class Parameters:
    """Parameters, what they are stepped with, and the steps that they have taken."""

    slots: list[Slot]
    states: list[dict[str, torch.Tensor]]
    variant: str
    rounding: str
    number: int = 0
    stepper: FusedStepper | None = None
    squares: torch.Tensor | None = None

    def settings(self):
        return settings_for(OPTIONS, self.number, self.variant, None)

    def fused(self, grads, measure=False):
        """Steps all at once; returns how many were skipped, and what was measured."""
        self.number += 1
        if self.stepper is None:
            self.stepper = FusedStepper(DEVICE, self.variant == "mini")
        works = [Work(*w) for w in zip(self.slots, grads, self.states, strict=True)]
        assert all(fits(work.slot, work.grad) for work in works)
        self.stepper.begin(self.number, [self.settings()])
        prepared = self.stepper.prepare(works, [self.settings()], self.rounding, measure)
        self.squares = self.stepper.squares(prepared)
        return self.stepper.step(prepared)

    def reference(self, grads):
        """Steps one by one on the product, in float32; returns what was changed."""
        self.number += 1
        change = Change()
        for slot, grad, state in zip(self.slots, grads, self.states, strict=True):
            rounding = Rounding(self.rounding, slot.rounding_key, self.number)
            whole = grad.dense(torch.float32)
            step_parameter(Job(slot, whole, state, self.settings(), rounding, change))
        return change

    def weights(self):
        return {slot.name: slot.param.float().cpu().clone() for slot in self.slots}

    def everything(self):
        """Copies of weights and state."""
        tensors = [slot.param for slot in self.slots]
        return [t.clone() for t in (*tensors, *(t for s in self.states for t in s.values()))]


def parameters(
    shapes, dtype=torch.float32, rank=4, variant="channel", rounding="stochastic", view=None
):
    generator = torch.Generator().manual_seed(1)
    slots = []
    for index, (name, shape) in enumerate(shapes.items(), 1):
        weight = torch.randn(shape, generator=generator).mul(0.02).to(dtype).to(DEVICE)
        param = view(weight) if view else weight
        small = rank if param.dim() > 1 else None
        slots.append(Slot(name, param, index, 0, small, Region.whole_of(param.shape)))
        slots[-1].set_seed(0)
    return Parameters(slots, [new_state(slot, rounding) for slot in slots], variant, rounding)


def factors(shape, tokens, dtype=torch.float32, seed=0, ends=None):
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(tokens, side, generator=generator).mul(0.3).to(dtype).to(DEVICE)
        for side in shape[-2:]
    )
    if ends is not None:
        ends = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    return Factored(left, right, ends)


def many(shapes, tokens, dtype=torch.float32, seed=0):
    return [factors(s, tokens, dtype, 100 * seed + i) for i, s in enumerate(shapes.values())]


def stepped(grads, shapes, **options):
    """Weights and states after the same steps on both paths."""
    fused, reference = parameters(shapes, **options), parameters(shapes, **options)
    for step in grads:
        fused.fused(step)
        reference.reference(step)
    return fused, reference


def assert_close(fused, reference):
    """Weights and moments in float32 agree to the rounding error of sums."""
    expected = reference.weights()
    for name, weight in fused.weights().items():
        apart = (weight - expected[name]).abs().max()
        assert apart < 1e-4 * expected[name].abs().max(), name
    for slot, got, wanted in zip(fused.slots, fused.states, reference.states, strict=True):
        for key, state in got.items():
            apart = (state.double() - wanted[key].double()).abs().max()
            assert apart <= 1e-4 * wanted[key].abs().max(), (slot.name, key)


def assert_rounded_alike(fused, reference):
    """bfloat16 weights are at most one number apart, and hardly any is."""
    expected = reference.weights()
    for name, weight in fused.weights().items():
        # Weights that the step carried across zero are held to the spacing of numbers as large
        # as the step: their own is below the rounding of float32 sums.
        largest = expected[name].abs().clamp(min=1e-3)
        apart = (weight - expected[name]).abs()
        assert (apart <= torch.exp2(largest.log2().floor() - 7)).all(), name
        assert (apart > 0).float().mean() < 0.01, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("variant", ["channel", "mini"])
def test_float32_weights_agree_to_rounding_error(variant, tokens, dtype):
    grads = [many(SHAPES, tokens, dtype, seed) for seed in range(3)]
    assert_close(*stepped(grads, SHAPES, variant=variant))


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [7, 200])
@pytest.mark.parametrize("rank", [4, 64, 100, 256, 300])
def test_ranks_agree_to_rounding_error(rank, tokens, dtype):
    shapes = {"tall": (1032, 512), "wide": (320, 776), "square": (512, 512), "odd": (333, 417)}
    grads = [many(shapes, tokens, dtype, seed) for seed in range(2)]
    assert_close(*stepped(grads, shapes, rank=rank))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bfloat16_weights_round_as_on_the_reference_path(rounding, tokens, dtype):
    grads = [many(SHAPES, tokens, dtype)]
    options = {"dtype": torch.bfloat16, "rounding": rounding}
    assert_rounded_alike(*stepped(grads, SHAPES, **options))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_gradient_of_zero_rounds_to_the_same_bits(rounding):
    """Both paths round the same exact number, W (1 - lr lambda)."""
    grads = [[Factored(g.left, g.right * 0) for g in many(SHAPES, 7)]]
    options = {"dtype": torch.bfloat16, "rounding": rounding}
    fused, reference = stepped(grads, SHAPES, **options)
    for got, wanted in zip(fused.everything(), reference.everything(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("tokens", [0, 7])
def test_a_matrix_without_tokens_has_a_gradient_of_zero(tokens):
    grads = [[Factored(g.left[:tokens], g.right[:tokens] * 0) for g in many(SHAPES, 7)]]
    fused, reference = stepped(grads, SHAPES)
    for got, wanted in zip(fused.everything(), reference.everything(), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(5, 72, 40), (5, 40, 72), (5, 37, 53)], ids=["tall", "wide", "odd"]
)
def test_experts_step_by_the_tokens_that_each_has(shape, dtype):
    options = {"dtype": torch.bfloat16, "rounding": "nearest"}
    # The last expert takes whatever is left: the device alone knows.
    ends = [[0, 1, 1, 38, 45], [3, 3, 40, 45, 45]]
    grads = [[factors(shape, 45, dtype, s, e)] for s, e in enumerate(ends)]
    fused, reference = parameters({"stack": shape}, **options), parameters({"stack": shape})
    before = fused.everything()
    fused.fused(grads[0])
    for left_alone in (0, 2):
        for tensor, old in zip(fused.everything(), before, strict=True):
            assert torch.equal(tensor[left_alone], old[left_alone])
    assert not torch.equal(fused.slots[0].param[1], before[0][1])
    fused = parameters({"stack": shape})
    for step in grads:
        assert int(fused.fused(step)[0]) == 0
        reference.reference(step)
    assert_close(fused, reference)


@needs_cuda
def test_many_experts_of_many_tokens():
    shape, tokens = (16, 264, 136), 2000
    generator = torch.Generator().manual_seed(3)
    cuts = torch.randint(0, tokens + 1, (15,), generator=generator).sort().values.tolist()
    grads = [[factors(shape, tokens, torch.bfloat16, 0, [*cuts, tokens])]]
    assert_close(*stepped(grads, {"stack": shape}, rank=64))


@pytest.mark.parametrize("lay", [lambda w: w, lambda w: w.mT.contiguous().mT], ids=["rows", "cols"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_stepped_in_place_and_nothing_beside_them(lay, dtype):
    shapes = {"q": (96, 72), "k": (24, 72), "odd": (37, 51)}
    holders = []

    def view(weight):
        rows, cols = weight.shape
        holder = torch.full((rows + 16, cols + 16), 7.0, dtype=weight.dtype, device=DEVICE)
        holders.append(lay(holder))
        part = holders[-1][8:-8, 8:-8]
        part.copy_(weight)
        return part

    grads, options = many(shapes, 40, dtype), {"dtype": torch.bfloat16}
    inside, plain = parameters(shapes, view=view, **options), parameters(shapes, **options)
    inside.fused(grads)
    plain.fused(grads)
    for name, weight in inside.weights().items():
        assert torch.equal(weight, plain.weights()[name]), name
    for holder in holders:
        assert (holder[:8] == 7).all() and (holder[-8:] == 7).all()
        assert (holder[:, :8] == 7).all() and (holder[:, -8:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_may_be_columns_of_wider_ones(dtype):
    grads = many(SHAPES, 7, dtype)
    wide = [
        Factored(*(torch.nn.functional.pad(t, (3, 2))[:, 3:-2] for t in (g.left, g.right)))
        for g in grads
    ]
    one, two = parameters(SHAPES), parameters(SHAPES)
    one.fused(grads)
    two.fused(wide)
    for name, weight in one.weights().items():
        assert torch.equal(weight, two.weights()[name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_that_are_not_finite_are_skipped_and_the_others_step(dtype, side, value):
    grads = many(SHAPES, 40, dtype)
    bad = getattr(grads[1], side).clone()
    bad[5, 3] = value
    options = {"dtype": torch.bfloat16}
    fused, clean = parameters(SHAPES, **options), parameters(SHAPES, **options)
    alone = replace(fused, slots=fused.slots[1:2], states=fused.states[1:2])
    before = alone.everything()
    skipped, _ = fused.fused([grads[0], replace(grads[1], **{side: bad}), *grads[2:]])
    clean.fused(grads)
    assert int(skipped) == 1
    for tensor, old in zip(alone.everything(), before, strict=True):
        assert torch.equal(tensor, old)
    for name, weight in fused.weights().items():
        assert torch.equal(weight, clean.weights()[name]) == (name != "wide")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_measured_is_what_changed(dtype):
    fused = parameters(SHAPES, dtype=dtype, rounding="nearest")
    before = fused.weights()
    _, sums = fused.fused(many(SHAPES, 7), measure=True)
    changes = [(fused.weights()[n] - w).double() for n, w in before.items()]
    assert float(sums[0]) == pytest.approx(sum(float((c * c).sum()) for c in changes), 1e-6)
    assert int(sums[1]) == sum(int((c != 0).sum()) for c in changes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("small", [False, True], ids=["one wave", "many waves"])
def test_together_and_alone_leave_the_same_bits(monkeypatch, small, dtype):
    shapes = {**SHAPES, "stack": (3, 48, 24), "again": SHAPES["tall"]}
    grads = [*many(SHAPES, 40, dtype), factors((3, 48, 24), 40, dtype, 7, [11, 11, 40])]
    grads.append(factors(SHAPES["tall"], 7, dtype, 8))
    options = {"dtype": torch.bfloat16, "variant": "channel"}
    alone, together = parameters(shapes, **options), parameters(shapes, **options)
    for slot, grad, state in zip(alone.slots, grads, alone.states, strict=True):
        replace(alone, slots=[slot], states=[state]).fused([grad])
    if small:
        monkeypatch.setattr(tables, "WAVE_BYTES", 1)
        monkeypatch.setattr(tables, "PORTION_BYTES", 1)
    together.fused(grads)
    for got, wanted in zip(together.everything(), alone.everything(), strict=True):
        assert torch.equal(got, wanted)


def test_factors_and_whole_gradients_share_a_step():
    grads = many(SHAPES, 7)
    mixed = [g.dense() if i % 2 else g for i, g in enumerate(grads)]
    fused, reference = parameters(SHAPES), parameters(SHAPES)
    fused.fused(mixed)
    reference.reference(grads)
    assert_close(fused, reference)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_the_products(tokens, dtype):
    grads = many(SHAPES, tokens, dtype)
    grads[1] = torch.ones(list(SHAPES.values())[1], dtype=dtype, device=DEVICE)
    fused = parameters(SHAPES, dtype=dtype)
    fused.fused(grads)
    whole = [g if isinstance(g, torch.Tensor) else g.dense() for g in grads]
    expected = sum(float(g.double().square().sum()) for g in whole)
    assert float(fused.squares) == pytest.approx(expected, rel=1e-5)
    if not isinstance(grads[0], torch.Tensor):
        grads[0].left[-1, 3] = torch.nan
    fused.fused(grads)
    assert not fused.squares.isfinite()


def test_a_plan_holds_for_any_number_of_tokens():
    fused, reference = parameters(SHAPES), parameters(SHAPES)
    for seed, tokens in enumerate([7, 40, 1, 33]):
        grads = many(SHAPES, tokens, seed=seed)
        fused.fused(grads)
        reference.reference(grads)
    assert len(fused.stepper._waves) == 1
    assert_close(fused, reference)


def test_what_the_kernels_take():
    slot = parameters({"w": (24, 40)}).slots[0]
    grad = factors((24, 40), 7)
    assert fits(slot, grad)
    assert not fits(replace(slot, rank=None), grad)
    assert not fits(slot, Factored(grad.left.half(), grad.right.half()))
    assert not fits(slot, Factored(grad.left, grad.right.bfloat16()))
    assert not fits(slot, Factored(grad.left.mT.contiguous().mT, grad.right))


@needs_cuda
def test_a_step_waits_for_nothing():
    shapes = {**SHAPES, "stack": (3, 48, 24)}
    fused = parameters(shapes, dtype=torch.bfloat16)
    steps = [
        [*many(SHAPES, t, torch.bfloat16, t), factors((3, 48, 24), t, torch.bfloat16, t, [1, 2, t])]
        for t in (40, 40, 7)
    ]
    fused.fused(steps[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for grads in steps[1:]:
            fused.number += 1
            works = [Work(*w) for w in zip(fused.slots, grads, fused.states, strict=True)]
            fused.stepper.begin(fused.number, [fused.settings()])
            prepared = fused.stepper.prepare(works, [fused.settings()], fused.rounding, False)
            fused.stepper.squares(prepared)
            fused.stepper.step(prepared)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_nothing_is_allocated_once_kernels_write(monkeypatch):
    shapes = {**SHAPES, "aligned": (256, 128), "vector": (75,)}
    fused = parameters(shapes, dtype=torch.bfloat16)
    grads = many(SHAPES, 40, torch.bfloat16)
    grads += [torch.ones(s, dtype=torch.bfloat16, device=DEVICE) for s in ((256, 128), (75,))]
    counts = []
    launch = FusedStepper._launch

    def counted(*args):
        counts.append(torch.cuda.memory_stats()["allocation.all.allocated"])
        launch(*args)
        counts.append(torch.cuda.memory_stats()["allocation.all.allocated"])

    monkeypatch.setattr(FusedStepper, "_launch", counted)
    fused.fused(grads, measure=True)
    assert counts[0] == counts[1]
