"""The compiled path on a CPU against the reference path: the same step, in other loops."""

import math
import threading
import time
from itertools import pairwise

import pytest
import torch

from apollo_trainer.optim import Apollo, cpu
from apollo_trainer.optim.ahead import compile_ahead
from tests.waiting import HANG

SHAPES = {
    "tall": (96, 40),
    "wide": (40, 136),
    "square": (64, 64),
    "odd": (37, 83),
    "stack": (3, 48, 24),
    "vector": (75,),
    "small": (4, 200),
    "cube": (2, 3, 5),
    "number": (),
    "empty": (0, 8),
}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradients(shapes, dtype, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {n: torch.randn(s, generator=generator).mul(0.1).to(dtype) for n, s in shapes.items()}
        for _ in range(steps)
    ]


def weights_of(shapes, dtype, view=None):
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator).mul(0.02).to(dtype)
        made[name] = view(weight) if view else weight
    return made


def run(impl, shapes, grads, dtype=torch.bfloat16, view=None, weights=None, state=None, **options):
    """Weights and the optimizer after the given gradients."""
    weights = weights if weights is not None else weights_of(shapes, dtype, view)
    settings = {"lr": 1e-2, "rank": 16, "proj_refresh": 3, "weight_decay": 0.1} | options
    optimizer = Apollo(weights.items(), impl=impl, **settings)
    if state is not None:
        optimizer.load_named_state(*state)
    optimizer.measure = True
    for step in grads:
        for name, weight in weights.items():
            weight.grad_dtype = step[name].dtype
            weight.grad = step[name]
        optimizer.step()
    return weights, optimizer


def worst(ours, theirs):
    """The largest distance of two tensors in spacings of the numbers there, or of a step."""
    if not ours.numel():
        return 0.0
    a, b = ours.double(), theirs.double()
    bits = {torch.bfloat16: 7, torch.float16: 10}.get(ours.dtype, 23)
    largest = torch.maximum(a.abs(), b.abs()).clamp(min=1e-2)
    return float(((a - b).abs() / torch.exp2(largest.log2().floor() - bits)).max())


@pytest.mark.parametrize("variant", ["channel", "mini"])
@pytest.mark.parametrize("rank", [1, 16, 20, None])
def test_float32_weights_agree_to_rounding_error(variant, rank):
    grads = gradients(SHAPES, torch.float32, 7)
    ours, _ = run("fused", SHAPES, grads, torch.float32, variant=variant, rank=rank)
    theirs, _ = run("reference", SHAPES, grads, torch.float32, variant=variant, rank=rank)
    for name in SHAPES:
        if theirs[name].numel():
            # With rank 1 a channel's factor has no bound; its rounding error grows with it.
            bound = 1e-5 * float(theirs[name].abs().max())
            assert (ours[name] - theirs[name]).abs().max() < bound, name


@pytest.mark.parametrize("rounding", ["nearest", "split16"])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
def test_a_bfloat16_step_agrees_to_one_number(rounding, grad_dtype):
    grads = gradients(SHAPES, grad_dtype, 3)
    before, optimizer = run("reference", SHAPES, grads[:2], rounding=rounding)
    after = {}
    for impl in ("fused", "reference"):
        copies = {n: w.clone() for n, w in before.items()}
        state = optimizer.named_state()
        after[impl], _ = run(
            impl, SHAPES, grads[2:], weights=copies, state=state, rounding=rounding
        )
    for name in SHAPES:
        assert worst(after["fused"][name], after["reference"][name]) <= 1, name


def test_split16_follows_float32():
    shapes = {n: s for n, s in SHAPES.items() if n != "empty"}
    grads = gradients(shapes, torch.bfloat16, 20)
    start = {n: w.float() for n, w in weights_of(shapes, torch.bfloat16).items()}
    exact, _ = run("fused", shapes, grads, weights=start, lr=1e-5)
    split, _ = run("fused", shapes, grads, rounding="split16", lr=1e-5)
    for name in shapes:
        assert torch.equal(split[name], exact[name].bfloat16()), name


@pytest.mark.parametrize("grad_dtype", [torch.float16, torch.float32])
def test_a_float16_step_agrees_to_one_number(grad_dtype):
    grads = gradients(SHAPES, grad_dtype, 3)
    options = {"dtype": torch.float16, "rounding": "nearest"}
    ours, _ = run("fused", SHAPES, grads, **options)
    theirs, _ = run("reference", SHAPES, grads, **options)
    for name in SHAPES:
        assert worst(ours[name], theirs[name]) <= 1, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_rounding_draws_the_same_bits(dtype, rounding):
    # With a gradient of zero both paths round the same exact number, W (1 - lr lambda).
    shapes = {n: s for n, s in SHAPES.items() if n != "stack"}
    zero = [{n: torch.zeros(s, dtype=dtype) for n, s in shapes.items()}] * 3

    def start():
        found = weights_of(shapes, dtype)
        # Down to the smallest numbers, and up to the largest.
        found["wide"] *= torch.logspace(-6, 0, 136).to(dtype)
        found["tall"][0, :3] = torch.tensor([torch.finfo(dtype).max, math.inf, math.nan])
        return found

    before, options = start(), {"dtype": dtype, "rounding": rounding, "weight_decay": 1.0}
    ours, _ = run("fused", shapes, zero, weights=start(), **options)
    theirs, _ = run("reference", shapes, zero, weights=start(), **options)
    for name in shapes:
        a, b = (x[name].masked_fill(x[name].isnan(), 7).view(torch.int16) for x in (ours, theirs))
        assert torch.equal(a, b), name
        if ours[name].numel() > 10:
            assert not torch.equal(ours[name], before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (3, 48, 24)])
@pytest.mark.parametrize(
    "lay",
    [
        lambda w: torch.nn.functional.pad(w, (3, 5, 2, 2)).narrow(-1, 3, w.shape[-1]),
        lambda w: w.mT.contiguous().mT,
        lambda w: torch.stack((w, w), -1)[..., 0],
    ],
    ids=["slice", "transposed", "every other"],
)
def test_strides_of_weights_and_gradients_change_no_bit(dtype, shape, lay):
    def view(weight):
        laid = lay(weight)
        return laid.narrow(-2, 2, weight.shape[-2]) if laid.shape != weight.shape else laid

    shapes = {"w": shape}
    grads = gradients(shapes, dtype, 3)
    plain, _ = run("fused", shapes, grads, dtype)
    strided, _ = run("fused", shapes, [{"w": view(g["w"])} for g in grads], dtype, view)
    assert not strided["w"].is_contiguous()
    assert torch.equal(strided["w"], plain["w"])


def test_a_slice_is_stepped_and_nothing_beside_it():
    holder = torch.full((64, 72), 7.0, dtype=torch.bfloat16)
    part = holder[8:-8, 8:-8]
    part.copy_(torch.randn(48, 56, generator=torch.Generator().manual_seed(0)))
    run(
        "fused", {"w": (48, 56)}, gradients({"w": (48, 56)}, torch.bfloat16, 2), weights={"w": part}
    )
    assert (holder[:8] == 7).all() and (holder[-8:] == 7).all()
    assert (holder[:, :8] == 7).all() and (holder[:, -8:] == 7).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_the_others_step(value):
    grads = gradients(SHAPES, torch.bfloat16, 3)
    clean = [dict(step) for step in grads]
    for name in ("wide", "vector"):
        grads[1][name] = grads[1][name].clone()
        grads[1][name].view(-1)[5] = value
    ours, optimizer = run("fused", SHAPES, grads)
    others, _ = run("fused", SHAPES, clean)
    assert optimizer.skipped_nonfinite == 2
    for name in SHAPES:
        assert ours[name].isfinite().all()
        steps = int(optimizer.state[ours[name]]["step"].max()) if ours[name].numel() else 0
        if name in ("wide", "vector"):
            assert steps == 2
        else:
            assert torch.equal(ours[name], others[name])


def test_an_expert_without_a_gradient_is_left_alone():
    shapes = {"stack": SHAPES["stack"]}
    grads = gradients(shapes, torch.bfloat16, 2)
    for step in grads:
        step["stack"][1] = 0
    ours, optimizer = run("fused", shapes, grads)
    before = weights_of(shapes, torch.bfloat16)
    assert torch.equal(ours["stack"][1], before["stack"][1])
    assert not torch.equal(ours["stack"][0], before["stack"][0])
    assert optimizer.state[ours["stack"]]["step"].tolist() == [2, 0, 2]


def test_the_step_after_a_zero_gradient_is_a_whole_one():
    shapes = {"tall": SHAPES["tall"]}
    grads = gradients(shapes, torch.float32, 5)
    grads[3] = {"tall": torch.zeros(SHAPES["tall"])}
    seen = [run("fused", shapes, grads[:n], torch.float32, weight_decay=0.0)[0] for n in range(6)]
    moved = [float((b["tall"] - a["tall"]).norm()) for a, b in pairwise(seen)]
    assert moved[3] == 0
    assert moved[4] > 0.5 * moved[2]


@pytest.mark.parametrize("rounding", ["stochastic", "split16"])
def test_the_number_of_threads_changes_no_bit(rounding):
    # Large enough for several tiles and chunks.
    shapes = {**SHAPES, "large": (700, 900), "long": (600_000,), "experts": (4, 300, 400)}
    grads = gradients(shapes, torch.bfloat16, 2)
    two, _ = run("fused", shapes, grads, rounding=rounding)
    torch.set_num_threads(1)
    one, _ = run("fused", shapes, grads, rounding=rounding)
    for name in shapes:
        assert torch.equal(one[name], two[name]), name
    torch.set_num_threads(3)
    three, _ = run("fused", shapes, grads, rounding=rounding)
    assert torch.get_num_threads() == 3, "the step left the caller's threads alone"
    for name in shapes:
        assert torch.equal(one[name], three[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_measured_agrees(dtype):
    grads = gradients(SHAPES, dtype, 2)
    ours = run("fused", SHAPES, grads, dtype, rounding="nearest")[1]
    theirs = run("reference", SHAPES, grads, dtype, rounding="nearest")[1]
    assert float(ours.last_update_norm) == pytest.approx(float(theirs.last_update_norm), 1e-3)
    fraction = float(theirs.last_changed_fraction)
    assert float(ours.last_changed_fraction) == pytest.approx(fraction, 1e-2)


def test_a_state_resumes_on_the_other_path():
    grads = gradients(SHAPES, torch.float32, 6)
    whole, _ = run("fused", SHAPES, grads, torch.float32)
    half, optimizer = run("reference", SHAPES, grads[:3], torch.float32)
    state = optimizer.named_state()
    resumed, _ = run("fused", SHAPES, grads[3:], weights=half, state=state)
    for name in SHAPES:
        assert torch.allclose(resumed[name], whole[name], rtol=1e-4, atol=3e-6), name


def test_a_dtype_that_no_loop_takes_is_left_to_the_reference_and_refused_by_fused():
    weights = weights_of({"w": (8, 8), "x": (8, 8)}, torch.float16)
    weights["x"].grad_dtype = torch.float64
    for name, dtype in (("w", torch.float16), ("x", torch.float64)):
        weights[name].grad = torch.ones(8, 8, dtype=dtype)
    before = {name: weight.clone() for name, weight in weights.items()}
    with pytest.raises(ValueError, match=r"^x: impl='fused' takes .* nothing was changed"):
        Apollo(weights.items(), rank=4, impl="fused").step()
    assert all(torch.equal(before[name], weight) for name, weight in weights.items())
    Apollo(weights.items(), rank=4, impl="auto").step()
    assert all((before[name] != weight).any() for name, weight in weights.items())


def test_many_weights_that_no_compiled_path_takes_are_told(monkeypatch):
    weights = weights_of({"large": (1024, 1024), "small": (8, 8)}, torch.float16)
    slow = {impl: Apollo(weights.items(), impl=impl) for impl in ("auto", "fused", "reference")}
    assert [optimizer.slowness() for optimizer in slow.values()] == [""] * 3
    monkeypatch.setattr(cpu, "fits", lambda slot, grad: slot.name == "large")
    assert slow["auto"].slowness() == "", "a few small ones are not worth a word"
    monkeypatch.setattr(cpu, "fits", lambda slot, grad: False)
    told = slow["auto"].slowness()
    assert "1048640 of 1048640 weights" in told and "takes torch.float16 on cpu." in told
    assert slow["reference"].slowness() == "", "plain torch was asked for"
    assert Apollo([("small", weights["small"])]).slowness() == "", "plain torch is as good there"


def signatures() -> dict[str, int]:
    """For how many types each loop is compiled in this process."""
    from apollo_trainer.optim.cpu import loops

    return {n: len(f.signatures) for n, f in vars(loops).items() if hasattr(f, "signatures")}


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float32, "stochastic"),
        (torch.bfloat16, "stochastic"),
        (torch.bfloat16, "split16"),
        (torch.float16, "stochastic"),
        (torch.float16, "nearest"),
    ],
)
def test_what_was_compiled_ahead_is_all_that_a_step_needs(dtype, rounding):
    shapes = {**SHAPES, "large": (1100, 1000)}
    weights, optimizer = run("auto", shapes, [], dtype, rounding=rounding)
    compile_ahead(optimizer)
    before = {name: weight.clone() for name, weight in weights.items()}
    compiled = signatures()
    for name, weight in weights.items():
        assert torch.equal(weight, before[name]), "throwaway parameters were stepped, none of these"
        weight.grad = torch.ones_like(weight)
    optimizer.measure = True
    optimizer.step()
    assert signatures() == compiled


def test_few_weights_are_stepped_by_plain_torch():
    grads = gradients(SHAPES, torch.bfloat16, 2)
    small, _ = run("auto", SHAPES, grads)
    plain, _ = run("reference", SHAPES, grads)
    assert all(torch.equal(small[name], plain[name]) for name in SHAPES)
    grads = gradients({"large": (1024, 1024)}, torch.bfloat16, 1)
    large, _ = run("auto", {"large": (1024, 1024)}, grads)
    compiled, _ = run("fused", {"large": (1024, 1024)}, grads)
    assert torch.equal(large["large"], compiled["large"])


def test_an_error_in_one_parameter_reaches_the_caller(monkeypatch):
    from apollo_trainer.optim.cpu import matrices

    def fail(*_):
        raise MemoryError("no room")

    weights, optimizer = run("fused", SHAPES, [])
    monkeypatch.setattr(matrices.Writer, "write", fail)
    for name, weight in weights.items():
        weight.grad = torch.ones(SHAPES[name], dtype=weight.dtype)
    with pytest.raises(MemoryError, match="no room"):
        optimizer.step()
    monkeypatch.undo()
    optimizer.step()
    assert optimizer.step_count == 1


def test_a_failure_does_not_wait_for_works_that_end_after_it():
    from apollo_trainer.optim.cpu import threads

    begun, failed = threading.Event(), threading.Event()

    def fail():
        begun.wait(HANG)
        failed.set()
        raise MemoryError("no room")

    def end_later():
        begun.set()
        failed.wait(HANG)
        time.sleep(0.1)

    def work(task):
        yield [task]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError, match="no room"):
            threads.run([work(fail), work(end_later)])
    finally:
        torch.set_num_threads(before)
