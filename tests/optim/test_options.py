"""Every option is checked where it is given."""

import math

import pytest
import torch
from torch import nn

from apollo_trainer.optim import Apollo, cpu

BAD = [
    ("lr", math.nan), ("lr", -1e-3), ("lr", math.inf), ("lr", "1e-3"), ("lr", None),
    ("rank", 0), ("rank", 2.5), ("rank", True),
    ("betas", (0.9, 1.0)), ("betas", (-0.1, 0.9)), ("betas", (0.9,)), ("betas", 0.9),
    ("betas", (math.nan, 0.9)),
    ("eps", 0.0), ("eps", math.nan), ("weight_decay", -0.1), ("weight_decay", math.inf),
    ("warmup_steps", -1), ("warmup_steps", 1.5), ("scale", 0.0), ("scale", math.nan),
    ("proj_refresh", 0), ("norm_growth_limit", 0.99), ("norm_growth_limit", math.nan),
    ("variant", "tensor"), ("rounding", "up"), ("impl", "cuda"), ("compat", "galore"),
    ("seed", -1), ("seed", 0.5), ("seed", 2**63),
]  # fmt: skip


def pairs(dtype=torch.float32):
    return [("w", nn.Parameter(torch.zeros(8, 8, dtype=dtype)))]


@pytest.mark.parametrize(("option", "value"), BAD)
def test_a_bad_option_is_named(option, value):
    with pytest.raises(ValueError, match=rf"^{option} is "):
        Apollo(pairs(), **{option: value})


@pytest.mark.parametrize("option", ["lr", "betas", "warmup_from", "rank"])
def test_a_bad_group_option_is_named_and_the_group_not_added(option):
    optimizer = Apollo(pairs(), rank=4)
    with pytest.raises(ValueError, match=rf"^{option} is "):
        optimizer.add_param_group({"params": [("x", nn.Parameter(torch.zeros(3)))], option: -1})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.named_state()[1]["parameters"]) == 1


@pytest.mark.parametrize("option", ["variant", "rounding", "seed", "impl", "compat"])
def test_options_of_the_whole_optimizer_are_refused_in_a_group(option):
    with pytest.raises(ValueError, match=f"^{option} belongs to the whole optimizer"):
        Apollo([{"params": pairs(), option: 0}])


def test_fused_refuses_what_it_cannot_take_and_names_it(monkeypatch):
    with pytest.raises(ValueError, match="impl='reference'"):
        Apollo(pairs(), impl="fused", compat="apollo-torch")
    parameter = torch.zeros(3, 3)
    parameter.grad = torch.ones_like(parameter)
    # As without numba.
    monkeypatch.setattr(cpu, "fits", lambda *_: False)
    with pytest.raises(ValueError, match=r"^w: impl='fused'"):
        Apollo([("w", parameter)], impl="fused").step()
    Apollo([("w", parameter)], impl="auto").step()


def test_parameters_that_cannot_be_stepped_are_named():
    for dtype in (torch.float64, torch.complex64, torch.int32):
        p = torch.zeros(3, 3, dtype=dtype)
        with pytest.raises(ValueError, match=r"^w: dtype"):
            Apollo([("w", p)])
    with pytest.raises(ValueError, match=r"^w: rounding='split16' needs"):
        Apollo(pairs(torch.float16), rounding="split16")
    with pytest.raises(ValueError, match=r"^w: two parameters have this name"):
        Apollo([*pairs(), *pairs()])
    with pytest.raises(TypeError, match="is a set"):
        Apollo([{"params": {nn.Parameter(torch.zeros(3))}}])
    with pytest.raises(ValueError, match="empty parameter list"):
        Apollo([])


def test_parameters_without_names_are_numbered():
    optimizer = Apollo([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))])
    optimizer.add_param_group({"params": nn.Parameter(torch.zeros(5))})
    names = list(optimizer.named_state()[1]["parameters"])
    assert names == ["parameter_0", "parameter_1", "parameter_2"]


def test_a_group_may_have_its_own_rank():
    groups = [{"params": pairs()}, {"params": [("x", torch.zeros(8, 8))], "rank": None}]
    optimizer = Apollo(groups, rank=4)
    found = {n: p["rank"] for n, p in optimizer.named_state()[1]["parameters"].items()}
    assert found == {"w": 4, "x": None}
