"""The losses of a token against their formulas, and their gradients against differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from apollo_trainer.training.allocator import Allocations, CachingAllocator
from apollo_trainer.training.objectives import Clip, Targets, divergence, surrogate, weighed

V = 11


def drawn(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)


def top_of(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids of the k likeliest."""
    values, ids = F.log_softmax(logits, -1).topk(k)
    return ids, values


def kl_of(student: Tensor, ids: Tensor, teacher: Tensor) -> Tensor:
    """The divergence of k + 1 outcomes as it is written, in float64."""
    q = F.softmax(student.double(), -1).gather(1, ids)
    q = torch.cat([q, 1 - q.sum(1, keepdim=True)], 1)
    p = teacher.double().exp()
    p = torch.cat([p, 1 - p.sum(1, keepdim=True)], 1)
    return (p * (p / q).log()).sum(1)


def of_student(student: Tensor, ids: Tensor, teacher: Tensor) -> Tensor:
    return divergence(F.log_softmax(student, -1), ids, teacher)


@pytest.mark.parametrize("k", [1, 3, V - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_divergence_is_that_of_the_likeliest_and_all_others(k: int, dtype: torch.dtype) -> None:
    student, teacher = drawn(0, 7, V, dtype=dtype), drawn(1, 7, V, dtype=dtype)
    ids, said = top_of(teacher, k)
    expected = kl_of(student, ids, said)
    torch.testing.assert_close(
        of_student(student, ids, said).double(), expected, atol=1e-6, rtol=1e-5
    )


def test_over_the_whole_vocabulary_it_is_the_divergence() -> None:
    student, teacher = drawn(0, 7, V, dtype=torch.float32), drawn(1, 7, V, dtype=torch.float32)
    student.requires_grad_()
    ids, said = top_of(teacher, V)
    got = of_student(student, ids, said)
    whole = F.log_softmax(teacher, -1)
    expected = F.kl_div(F.log_softmax(student, -1), whole, reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(got, expected)
    (mine,) = torch.autograd.grad(got.sum(), student, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
def test_its_gradient_is_its_slope(k: int) -> None:
    ids, said = top_of(drawn(1, 5, V), k)
    student = drawn(0, 5, V).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: of_student(x, ids, said), student)


@settings(max_examples=100)
@given(st.integers(0, 2**31), st.integers(1, V), st.floats(0.0, 40.0), st.floats(0.0, 40.0))
def test_it_is_never_below_zero_and_finite_however_sure_either_is(
    seed: int, k: int, sure: float, surer: float
) -> None:
    student = drawn(seed, 3, V, scale=sure, dtype=torch.float32).requires_grad_()
    ids, said = top_of(drawn(seed + 1, 3, V, scale=surer, dtype=torch.float32), k)
    found = of_student(student, ids, said)
    assert bool((found >= -1e-5).all()) and bool(found.isfinite().all())
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert bool(gradient.isfinite().all())


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, V), st.floats(0.0, 40.0))
def test_it_is_zero_and_flat_where_the_student_says_what_the_teacher_does(
    seed: int, k: int, sure: float
) -> None:
    student = drawn(seed, 3, V, scale=sure, dtype=torch.float32).requires_grad_()
    found = of_student(student, *top_of(student.detach(), k))
    (gradient,) = torch.autograd.grad(found.sum(), student)
    # What k probabilities leave to 1 is known to 1e-7, and may be held against e^-200.
    assert float(found.detach().abs().max()) < 1e-4 and float(gradient.abs().max()) < 1e-5


def test_a_teacher_that_leaves_nothing_to_others_pulls_a_student_that_does() -> None:
    """Where the rest is a rounded 0 or the student's is tiny, a subtraction would be all noise."""
    teacher = torch.tensor([[60.0, 0.0, 0.0, 0.0]])
    ids, said = top_of(teacher, 1)
    student = torch.tensor([[0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    found = of_student(student, ids, said)
    assert float(found.detach()) == pytest.approx(math.log(4))
    (gradient,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(gradient, torch.tensor([[-0.75, 0.25, 0.25, 0.25]]))
    # And the other way: 1 - 0.99999... in float32 is no logarithm of the student's rest.
    found = of_student(teacher, torch.tensor([[0]]), torch.tensor([[math.log(0.25)]]))
    expected = 0.25 * math.log(0.25) + 0.75 * (math.log(0.75) + 60.0 - math.log(3))
    assert float(found) == pytest.approx(expected, rel=1e-6)


CLIPS = [Clip(), Clip(0.1, 0.3), Clip(0.0, 0.2), Clip(0.2, 0.0), Clip(0.0, 0.0), Clip(1.5, 0.5)]


def ppo(log_ratios: Tensor, advantages: Tensor, clip: Clip) -> Tensor:
    """Equation 7 as it is written."""
    r = log_ratios.exp()
    least = 1 - clip.low if clip.low else -math.inf
    most = 1 + clip.high if clip.high else math.inf
    return -torch.minimum(r * advantages, r.clamp(least, most) * advantages)


@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_a_policy_loss_is_ppos_and_its_gradient_its_slope(clip: Clip) -> None:
    ratios, advantages = drawn(2, 200, scale=0.5).requires_grad_(), drawn(3, 200)
    torch.testing.assert_close(
        surrogate(ratios, advantages, clip), ppo(ratios, advantages, clip), rtol=1e-9, atol=1e-12
    )
    assert torch.autograd.gradcheck(lambda x: surrogate(x, advantages, clip), ratios)


def test_at_a_ratio_of_one_the_gradient_is_that_of_the_likelihood() -> None:
    log_probs, advantages = drawn(2, 20).requires_grad_(), drawn(3, 20)
    loss = surrogate(log_probs - log_probs.detach(), advantages, Clip())
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    torch.testing.assert_close(gradient, -advantages)


@pytest.mark.parametrize(
    ("ratio", "advantage", "counts"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True),
     (0.9, -1.0, True), (1e30, 1.0, False)],
)  # fmt: skip
def test_a_ratio_that_went_far_enough_gives_no_gradient(
    ratio: float, advantage: float, counts: bool
) -> None:
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = surrogate(log_ratio, torch.tensor([advantage]), Clip())
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert float(gradient) == (pytest.approx(-ratio * advantage) if counts else 0.0)


def test_a_ratio_beyond_floats_is_cut_and_leaves_no_nan() -> None:
    log_ratio = torch.tensor([500.0, -500.0], requires_grad=True)
    loss = surrogate(log_ratio, torch.tensor([1.0, -1.0]), Clip())
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.2, 0.8]))
    assert gradient.tolist() == [0.0, 0.0]


def plain(logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """What cross-entropy alone was computed by."""
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.ids.flatten(), reduction="none"
    ).view_as(targets.ids)
    return (losses * targets.weights).sum(), losses.detach().sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_alone_is_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    ids = torch.tensor([[1, 2, 3], [4, -100, -100]])
    targets = Targets(ids, drawn(5, 2, 3, dtype=torch.float32))
    logits = drawn(4, 2, 3, V).to(dtype).requires_grad_()
    mine, theirs = weighed(logits, targets, Clip()), plain(logits, targets)
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1][None])
    (got,), (expected,) = (torch.autograd.grad(loss[0], logits) for loss in (mine, theirs))
    assert torch.equal(got, expected)


def peak(targets: Targets, size: int) -> int:
    """Bytes at most at once, of the loss and of its backward pass."""
    logits = torch.zeros(1, len(targets.ids[0]), size, requires_grad=True)
    with Allocations(CachingAllocator(), "cpu") as seen:
        loss, _ = weighed(logits, targets, Clip())
        torch.autograd.backward([loss])
        return seen.peak


def test_a_divergence_makes_one_more_tensor_of_the_vocabularys_size() -> None:
    tokens, size = 8, 4096
    ids, weights = torch.zeros(1, tokens, dtype=torch.int64), torch.ones(1, tokens)
    top = torch.arange(4).expand(1, tokens, 4).contiguous()
    teacher = torch.full((1, tokens, 4), math.log(0.2))
    policy = torch.zeros(2, 1, tokens)
    alone = peak(Targets(ids, weights), size)
    together = peak(Targets(ids, weights, top, teacher, policy), size)
    assert together - alone < 1.2 * tokens * size * 4
