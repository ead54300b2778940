"""The update of Algorithm 1 (arXiv 2412.05270): its parts, its size and its symmetries."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from apollo_trainer.optim import Apollo, reference
from apollo_trainer.optim.philox import derive_key
from apollo_trainer.optim.projection import draw_projection

CPU = torch.device("cpu")


def random(shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def weights(shape, seed=0, dtype=torch.float32):
    return nn.Parameter(random(shape, seed, 0.02).to(dtype))


def run(params, grads, **options):
    """Steps `params` (name -> tensor) through `grads`, a list of name -> gradient."""
    optimizer = Apollo(list(params.items()), **options)
    for step in grads:
        for name, p in params.items():
            p.grad = step.get(name)
        optimizer.step()
    return optimizer


class Algorithm1:
    """The paper's Algorithm 1 for one matrix [m, n] with m <= n, as it is printed, in float64."""

    def __init__(self, W, name, rank, lr, weight_decay, refresh, variant, seed):
        self.W, self.name, self.rank, self.lr = W.double(), name, rank, lr
        self.weight_decay, self.refresh, self.variant = weight_decay, refresh, variant
        self.seed, self.t, self.M, self.V, self.previous = seed, 0, 0.0, 0.0, None

    def step(self, G):
        m, n = G.shape
        key = derive_key(self.seed, self.name, "projection")
        P = draw_projection(key, self.t // self.refresh, self.rank, m, CPU).double()
        self.t += 1
        R = P @ G.double()
        self.M = 0.9 * self.M + 0.1 * R
        self.V = 0.999 * self.V + 0.001 * R**2
        R_tilde = (self.M / (1 - 0.9**self.t)) / ((self.V / (1 - 0.999**self.t)).sqrt() + 1e-8)
        if self.variant == "channel":
            s = R_tilde.norm(dim=0) / R.norm(dim=0)
        else:
            s = (R_tilde.norm() / R.norm()).expand(n)
        X = G.double() @ torch.diag(s)
        if self.previous is not None:
            cap = max(1.01 * self.previous, 1e-3 * math.sqrt(m * n))
            X = X * min(1.0, cap / float(X.norm()))
        self.previous = float(X.norm())
        alpha = math.sqrt(m / self.rank)
        self.W = self.W - self.lr * alpha * X - self.lr * self.weight_decay * self.W


@pytest.mark.parametrize("variant", ["channel", "mini"])
@pytest.mark.parametrize("shape", [(24, 80), (80, 24), (32, 32), (17, 33)])
def test_follows_the_paper(shape, variant):
    options = {"lr": 1e-2, "weight_decay": 0.1, "rank": 8, "seed": 5}
    p = weights(shape)
    tall = shape[0] >= shape[1]
    paper = Algorithm1(p.detach().T if tall else p.detach(), "w", 8, 1e-2, 0.1, 7, variant, seed=5)
    optimizer = Apollo([("w", p)], proj_refresh=7, variant=variant, **options)
    for step in range(30):
        grad = random(shape, 100 + step, 50.0 if step in (11, 20) else 1.0)
        p.grad = grad.clone()
        optimizer.step()
        paper.step(grad.T if tall else grad)
    expected = paper.W.T if tall else paper.W
    assert (p.detach() - expected).abs().max() < 2e-6
    assert (p.detach() - weights(shape)).abs().max() > 0.03


@pytest.mark.parametrize("variant", ["channel", "mini"])
def test_a_stack_is_its_matrices_one_by_one(variant):
    stack = weights((3, 40, 16))
    optimizer = Apollo([("w", stack)], lr=1e-2, rank=4, variant=variant)
    papers = [
        Algorithm1(stack.detach()[e].T, "w", 4, 1e-2, 0.01, 200, variant, 0) for e in range(3)
    ]
    for step in range(10):
        grad = random((3, 40, 16), 50 + step) * torch.tensor([1.0, 30.0, 0.1]).view(3, 1, 1)
        grad[1] *= 20.0 if step == 6 else 1.0
        stack.grad = grad
        optimizer.step()
        for e in range(3):
            papers[e].step(grad[e].T)
    for e in range(3):
        assert (stack.detach()[e] - papers[e].W.T).abs().max() < 1e-6


def test_an_expert_without_gradient_is_left_alone():
    stack = weights((3, 16, 12), dtype=torch.bfloat16)
    optimizer = Apollo([("w", stack)], lr=1e-2, rank=4)
    stack.grad = random((3, 16, 12), 1).bfloat16()
    optimizer.step()
    before = stack.detach().clone()
    state = {k: t.clone() for k, t in optimizer.state[stack].items()}
    stack.grad = random((3, 16, 12), 2).bfloat16()
    stack.grad[1] = 0
    optimizer.step()
    assert torch.equal(stack.detach()[1], before[1])
    for key, tensor in optimizer.state[stack].items():
        assert torch.equal(tensor[1], state[key][1]), key
        assert not torch.equal(tensor[0], state[key][0]), key
    assert optimizer.state[stack]["step"].tolist() == [2, 1, 2]
    assert not torch.equal(stack.detach()[0], before[0])
    assert optimizer.skipped_nonfinite == 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_rank_it_is_adamw(weight_decay):
    shapes = {"matrix": (40, 24), "vector": (33,), "stack": (3, 8, 9), "scalar": ()}
    ours = {n: weights(s) for n, s in shapes.items()}
    theirs = {n: weights(s) for n, s in shapes.items()}
    optimizer = Apollo(list(ours.items()), rank=None, lr=1e-3, weight_decay=weight_decay)
    oracle = torch.optim.AdamW(theirs.values(), lr=1e-3, weight_decay=weight_decay)
    for step in range(100):
        for n, name in enumerate(shapes):
            grad = random(shapes[name], 1000 * n + step, 10.0 if step == 40 else 1e-2)
            ours[name].grad, theirs[name].grad = grad.clone(), grad.clone()
        optimizer.step()
        oracle.step()
    for name in shapes:
        assert (ours[name] - theirs[name]).abs().max() <= 1e-6, name
        assert (ours[name] - weights(shapes[name])).abs().max() > 1e-2, name


def test_what_is_too_small_for_the_rank_takes_adam():
    shapes = {"flat": (3, 100), "vector": (100,), "kernel": (16, 16, 3, 3), "stack": (64, 64, 3)}
    params = {n: weights(s) for n, s in shapes.items()} | {"matrix": weights((4, 100))}
    optimizer = Apollo(list(params.items()), rank=4)
    for name, shape in shapes.items():
        assert set(optimizer.state[params[name]]) == {"m", "v", "step"}
        assert optimizer.state[params[name]]["m"].shape == shape
    assert optimizer.state[params["matrix"]]["m"].shape == (4, 100)


# At a low rank |R| itself scatters: the mean of a quotient is above the quotient of the means.
@pytest.mark.parametrize(("rank", "tolerance"), [(8, 0.15), (32, 0.05), (64, 0.03)])
def test_scaled_gradient_is_smaller_than_adams_by_the_root_of_rank_over_side(rank, tolerance):
    # All channels of a matrix share one P, so that several are needed for a mean.
    ratios = [movement_over_adams(rank, seed) for seed in range(6)]
    plain, apollo = (sum(each) / len(ratios) for each in zip(*ratios, strict=True))
    assert plain == pytest.approx(math.sqrt(rank / 128), rel=tolerance)
    assert apollo == pytest.approx(1.0, rel=tolerance)


def movement_over_adams(rank, seed):
    """How far the 20th step goes, over how far AdamW's goes: with scale 1, and by default."""
    grads = [{"w": random((128, 512), 10 + step)} for step in range(20)]
    moved = {}
    for name, options in {
        "plain": {"rank": rank, "scale": 1.0, "norm_growth_limit": None},
        "apollo": {"rank": rank},
        "adam": {"rank": None},
    }.items():
        p = weights((128, 512))
        optimizer = run({"w": p}, grads[:-1], lr=1e-3, weight_decay=0.0, seed=seed, **options)
        before = p.detach().clone()
        p.grad = grads[-1]["w"]
        optimizer.step()
        moved[name] = float((p.detach() - before).norm())
    return moved["plain"] / moved["adam"], moved["apollo"] / moved["adam"]


def step_sizes(grads, **options):
    p = weights((32, 64))
    optimizer = Apollo([("w", p)], lr=1e-3, rank=8, weight_decay=0.0, **options)
    sizes = []
    for grad in grads:
        before = p.detach().clone()
        p.grad = grad
        optimizer.step()
        sizes.append(float((p.detach() - before).norm()))
    return sizes


def test_recovers_on_the_step_after_a_zero_gradient():
    grads = [random((32, 64), step) for step in range(12)]
    grads[8] = torch.zeros(32, 64)
    sizes, free = step_sizes(grads), step_sizes(grads, norm_growth_limit=None)
    assert sizes[8] == 0.0
    assert sizes[9] == pytest.approx(min(free[9], 1.01 * sizes[7]), rel=1e-4)
    assert sizes[9] > 0.8 * sizes[7]


def test_recovers_after_a_first_step_of_zero_gradient():
    sizes = step_sizes([torch.zeros(32, 64), *(random((32, 64), step) for step in range(3))])
    assert sizes[0] == 0.0
    assert sizes[1] > 0.1 * 1e-3 * math.sqrt(32 * 64)


def test_a_first_near_zero_gradient_cannot_hold_a_matrix_still():
    grads = [random((32, 64), step) * (1e-15 if step == 0 else 1.0) for step in range(3)]
    sizes = step_sizes(grads)
    floor = 1e-3 * 2.0 * 1e-3 * math.sqrt(32 * 64)  # lr, alpha, and the limiter's own floor
    assert sizes[0] < 1e-2 * floor
    assert sizes[1] == pytest.approx(floor, rel=1e-3)
    assert sizes[2] == pytest.approx(1.01 * floor, rel=1e-3)


def test_limiter_caps_growth_per_step():
    grads = [random((32, 64), step) for step in range(10)]
    grads[7] = grads[7] * 1e4
    limited, free = step_sizes(grads), step_sizes(grads, norm_growth_limit=None)
    assert limited[7] == pytest.approx(1.01 * limited[6], rel=1e-4)
    assert free[7] > 1.2 * free[6]
    assert all(b <= 1.0101 * a for a, b in pairwise(limited))


@pytest.mark.parametrize("rounding", ["nearest", "split16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposing_a_matrix_transposes_its_update(dtype, rounding):
    grads = [random((24, 60), step).to(dtype) for step in range(12)]
    wide, tall = (
        weights((24, 60), dtype=dtype),
        nn.Parameter(weights((24, 60), dtype=dtype).detach().T.contiguous()),
    )
    options = {"lr": 1e-2, "rank": 8, "rounding": rounding, "proj_refresh": 5}
    run({"w": wide}, [{"w": g.clone()} for g in grads], **options)
    run({"w": tall}, [{"w": g.T.contiguous()} for g in grads], **options)
    assert torch.equal(wide, tall.T)
    assert not torch.equal(wide, weights((24, 60), dtype=dtype))


def test_transposing_under_stochastic_rounding_changes_the_draws_only():
    grad = random((24, 60), 7).bfloat16().float()
    start = weights((24, 60), dtype=torch.bfloat16).detach()
    exact, wide = nn.Parameter(start.float()), nn.Parameter(start.clone())
    tall = nn.Parameter(start.T.contiguous())
    for p, g in ((exact, grad), (wide, grad.bfloat16()), (tall, grad.bfloat16().T)):
        run({"w": p}, [{"w": g.to(p.dtype)}], lr=1e-4, rank=8)
    ulp = 2.0 ** (exact.detach().abs().log2().floor() - 7)
    assert ((wide.float() - exact).abs() <= 1.05 * ulp).all()
    assert ((tall.T.float() - exact).abs() <= 1.05 * ulp).all()
    assert not torch.equal(wide, tall.T)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "split16"])
def test_views_of_a_fused_matrix_are_stepped_like_matrices_of_their_own(rounding):
    fused = random((3 * 20, 48), 1, 0.02).bfloat16()
    views = {n: nn.Parameter(t) for n, t in zip("qkv", fused.split(20), strict=True)}
    own = {n: nn.Parameter(p.detach().clone()) for n, p in views.items()}
    fused_columns = torch.zeros(48, 60).bfloat16()
    strided = {
        n: nn.Parameter(fused_columns[:, 20 * i : 20 * i + 20].T) for i, n in enumerate("qkv")
    }
    for n, p in strided.items():
        p.data.copy_(own[n].detach())
    grads = [
        {n: random((20, 48), 10 * step + i).bfloat16() for i, n in enumerate("qkv")}
        for step in range(6)
    ]
    for params in (views, own, strided):
        run(params, grads, lr=1e-3, rank=8, rounding=rounding)
    for n in "qkv":
        assert torch.equal(views[n], own[n])
        assert torch.equal(strided[n], own[n])
    assert torch.equal(fused, torch.cat([own[n].detach() for n in "qkv"]))
    assert not views["q"].is_contiguous() or views["q"].data_ptr() == fused.data_ptr()


def test_strides_of_the_gradient_do_not_matter():
    grad = random((30, 40), 3)
    a, b = weights((30, 40)), weights((30, 40))
    padded = torch.zeros(60, 80)
    padded[::2, ::2] = grad
    run({"w": a}, [{"w": grad}], rank=8)
    run({"w": b}, [{"w": padded[::2, ::2]}], rank=8)
    assert torch.equal(a, b)


@pytest.mark.parametrize("rank", [None, 4])
def test_tile_size_does_not_change_the_result(monkeypatch, rank):
    grads = [{"w": random((21, 50), step).bfloat16()} for step in range(5)]
    whole = weights((21, 50), dtype=torch.bfloat16)
    run({"w": whole}, grads, lr=1e-3, rank=rank)
    monkeypatch.setattr(reference, "_TILE_CPU", 130)
    tiled = weights((21, 50), dtype=torch.bfloat16)
    run({"w": tiled}, grads, lr=1e-3, rank=rank)
    # A product over fewer columns may round its sums in another order.
    different = (whole != tiled).float().mean()
    assert different == 0 if rank is None else different < 0.01


def test_writes_in_place():
    p = weights((20, 30), dtype=torch.bfloat16)
    address, alias = p.data_ptr(), p.detach()
    run({"w": p}, [{"w": random((20, 30), 1).bfloat16()}], lr=1e-2, rank=8)
    assert p.data_ptr() == address
    assert torch.equal(alias, p)


def test_empty_parameters_are_harmless():
    empty, full = weights((0, 8)), weights((8, 8))
    run({"e": empty, "f": full}, [{"e": torch.zeros(0, 8), "f": random((8, 8))}], rank=4)
    assert not torch.equal(full, weights((8, 8)))
