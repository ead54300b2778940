"""A step: warm-up, ties, gradients that are not finite, measures."""

import math

import pytest
import torch
from torch import nn

from apollo_trainer.optim import Apollo


def random(shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def model(dtype=torch.bfloat16):
    shapes = {"a": (24, 40), "b": (40, 24), "norm": (40,), "experts": (3, 16, 12)}
    return {
        n: nn.Parameter(random(s, i, 0.02).to(dtype)) for i, (n, s) in enumerate(shapes.items())
    }


def give_gradients(params, step):
    for i, p in enumerate(params.values()):
        p.grad = random(p.shape, 100 * step + i).to(p.dtype)


def test_warm_up_counts_from_where_the_group_says():
    p = nn.Parameter(torch.zeros(3))
    optimizer = Apollo([("p", p)], lr=1.0, weight_decay=0.0, warmup_steps=4)
    moves = []
    for step in range(12):
        if step == 8:
            optimizer.param_groups[0]["warmup_from"] = optimizer.step_count
        before = p.detach().clone()
        p.grad = torch.ones(3)
        optimizer.step()
        moves.append(float((before - p.detach())[0]))
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 0.25, 0.5, 0.75, 1.0]
    assert moves == pytest.approx(expected, rel=1e-4)


def test_group_settings_take_effect_at_the_next_step():
    p = nn.Parameter(random((16, 24)))
    optimizer = Apollo([("p", p)], lr=1e-3, rank=8, weight_decay=0.0)
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.5)
    before = p.detach().clone()
    p.grad = random((16, 24), 1)
    optimizer.step()
    assert torch.equal(p, before)
    optimizer.param_groups[0].update(lr=0.1, scale=1e-9)
    optimizer.step()
    assert torch.allclose(p.detach(), before * 0.95, atol=1e-6)
    optimizer.param_groups[0]["lr"] = math.nan
    before = p.detach().clone()
    with pytest.raises(ValueError, match="lr is nan"):
        optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.step_count == 2


def test_the_same_tensor_twice_is_one_parameter():
    once, twice = model(), model()
    first = Apollo(once.items(), lr=1e-3, rank=8)
    pairs = [*twice.items(), ("again", twice["a"])]
    second = Apollo([{"params": pairs}, {"params": [("third", twice["a"])]}], lr=1e-3, rank=8)
    give_gradients(once, 0)
    give_gradients(twice, 0)
    first.step()
    second.step()
    assert all(torch.equal(once[n], twice[n]) for n in once)
    assert first.state_size_bytes() == second.state_size_bytes()


def test_tied_memory_steps_once_with_the_sum_of_its_gradients():
    memory = random((40, 16), 1, 0.02)
    alone = nn.Parameter(memory.clone())
    embedding, head = nn.Parameter(memory), nn.Parameter(memory)
    optimizer = Apollo([("embedding", embedding), ("head", head)], lr=1e-3, rank=8)
    reference = Apollo([("embedding", alone)], lr=1e-3, rank=8)
    for step in range(3):
        embedding.grad, head.grad = random((40, 16), 10 + step), random((40, 16), 20 + step)
        alone.grad = embedding.grad + head.grad
        reference.step()
        optimizer.step()
    assert torch.equal(embedding, alone)
    assert torch.equal(head, alone)
    optimizer.zero_grad()
    assert embedding.grad is None
    assert head.grad is None


def test_memory_shared_in_part_is_refused():
    fused = torch.zeros(6, 4)
    with pytest.raises(ValueError, match=r"^q: shares a part of its memory with qkv"):
        Apollo([("qkv", nn.Parameter(fused)), ("q", nn.Parameter(fused[:2]))])
    Apollo([("q", nn.Parameter(fused[:2])), ("k", nn.Parameter(fused[2:4]))])
    Apollo([("even", nn.Parameter(fused[::2])), ("odd", nn.Parameter(fused[1::2]))])
    with pytest.raises(ValueError, match=r"^wide: is an expanded view"):
        Apollo([("wide", nn.Parameter(torch.zeros(1, 4).expand(3, 4)))])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "split16"])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bad, rounding):
    params, expected = model(), model()
    optimizer = Apollo(params.items(), lr=1e-3, rank=8, rounding=rounding)
    reference = Apollo(expected.items(), lr=1e-3, rank=8, rounding=rounding)
    for step in range(2):
        give_gradients(params, step)
        give_gradients(expected, step)
        if step == 1:
            for name in ("a", "norm"):
                params[name].grad.flatten()[5] = bad
                expected[name].grad = None
            params["experts"].grad[1, 2, 3] = bad
            expected["experts"].grad[1] = 0
        optimizer.step()
        reference.step()
    for name in params:
        assert torch.equal(params[name], expected[name]), name
        for key, tensor in optimizer.state[params[name]].items():
            assert torch.equal(tensor, reference.state[expected[name]][key]), (name, key)
    assert optimizer.skipped_nonfinite == 3
    assert optimizer.step_count == 2


def test_a_sparse_gradient_is_refused_and_the_step_not_counted():
    embedding = nn.Embedding(20, 8, sparse=True)
    optimizer = Apollo(embedding.named_parameters(), rank=4)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="weight: the gradient is sparse"):
        optimizer.step()
    assert optimizer.step_count == 0
    embedding.weight.grad = embedding.weight.grad.to_dense()
    optimizer.step()
    assert optimizer.step_count == 1


def test_measures_are_those_of_the_stored_weights():
    params = model()
    optimizer = Apollo(params.items(), lr=1e-5, rank=8)
    give_gradients(params, 0)
    optimizer.step()
    assert optimizer.last_update_norm is None
    assert optimizer.last_changed_fraction is None
    optimizer.measure = True
    before = [p.detach().clone() for p in params.values()]
    params["b"].grad = None
    optimizer.step()
    after = [p.detach() for p in params.values()]
    pairs = list(zip(before, after, strict=True))
    square = sum(float((y.double() - x.double()).square().sum()) for x, y in pairs)
    changed = sum(int((x != y).sum()) for x, y in pairs)
    assert float(optimizer.last_update_norm) == pytest.approx(math.sqrt(square), rel=1e-12)
    elements = sum(p.numel() for p in params.values())
    assert float(optimizer.last_changed_fraction) == pytest.approx(changed / elements, rel=1e-12)
    assert 0 < changed < elements
    optimizer.zero_grad()
    optimizer.step()
    assert float(optimizer.last_update_norm) == 0.0


def test_closure_and_schedulers_work_as_with_any_optimizer():
    layer = nn.Linear(12, 10)
    optimizer = Apollo(layer.named_parameters(), lr=1e-2, rank=4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    x = random((8, 12))

    def closure():
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    losses = []
    for _ in range(5):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses == sorted(losses, reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 32)


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_every_written_parameter_is_announced_before_it_is_written(impl):
    torch.manual_seed(0)
    params = {n: nn.Parameter(torch.randn(s)) for n, s in (("w", (16, 8)), ("b", (8,)), ("c", 4))}
    optimizer = Apollo(params.items(), rank=4, lr=0.1, impl=impl)
    seen = {}

    def note(param):
        state = {part: t.clone() for part, t in optimizer.state[param].items()}
        seen[id(param)] = (param.detach().clone(), state)

    optimizer.before_param_write = note
    for p in (params["w"], params["b"]):
        p.grad = torch.randn_like(p)
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer.step()
    assert seen.keys() == {id(params["w"]), id(params["b"])}
    for name in ("w", "b"):
        value, state = seen[id(params[name])]
        assert torch.equal(value, before[name])
        assert not torch.equal(params[name], before[name])
        assert not any(t.any() for t in state.values())


def test_what_the_announcement_raises_leaves_all_parameters_unwritten():
    params = {n: nn.Parameter(torch.ones(4)) for n in "ab"}
    optimizer = Apollo(params.items(), lr=0.1, impl="reference")
    for p in params.values():
        p.grad = torch.ones(4)

    def refuse(param):
        if param is params["b"]:
            raise RuntimeError("no")

    optimizer.before_param_write = refuse
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    assert all(torch.equal(p, torch.ones(4)) for p in params.values())
    assert optimizer.step_count == 0


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_a_prepared_step_is_the_step_and_tells_the_norm_before(impl):
    plain, prepared = model(), model()
    first, second = (Apollo(p.items(), lr=1e-3, rank=8, impl=impl) for p in (plain, prepared))
    for step in range(3):
        grads = {name: random(tuple(p.shape), 30 + step) for name, p in plain.items()}
        first.step(gradients={plain[name]: g for name, g in grads.items()})
        given = {prepared[name]: g for name, g in grads.items()}
        before = {name: p.detach().clone() for name, p in prepared.items()}
        norm = float(second.prepare(given))
        assert norm == pytest.approx(
            math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        )
        assert all(torch.equal(prepared[n], before[n]) for n in before), "nothing is written yet"
        second.step(gradients=given)
    assert all(torch.equal(plain[n], prepared[n]) for n in plain)
    assert second.step_count == 3


def test_what_was_prepared_for_others_or_forgotten_is_not_stepped():
    params = model()
    optimizer = Apollo(params.items(), lr=1e-3, rank=8)
    wrong = {p: torch.full_like(p, torch.nan) for p in params.values()}
    assert not optimizer.prepare(wrong).isfinite()
    optimizer.step(gradients={p: torch.ones_like(p) for p in params.values()})
    optimizer.prepare(wrong)
    optimizer.forget()
    give_gradients(params, 0)
    optimizer.step()
    assert optimizer.skipped_nonfinite == 0
    assert all(p.isfinite().all() for p in params.values())
