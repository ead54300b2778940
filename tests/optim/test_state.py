"""Saving and loading: bit-exact resume, and refusals that change nothing."""

import io
import json

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from apollo_trainer.optim import Apollo

SHAPES = {"a": (24, 40), "b": (40, 24), "norm": (40,), "experts": (3, 16, 12)}


def random(shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def model(shapes=SHAPES, dtype=torch.bfloat16):
    return {
        n: nn.Parameter(random(s, i, 0.02).to(dtype)) for i, (n, s) in enumerate(shapes.items())
    }


def build(params, **options):
    decayed = [(n, p) for n, p in params.items() if n != "norm"]
    plain = [(n, p) for n, p in params.items() if n == "norm"]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return Apollo(
        groups, **{"lr": 1e-3, "rank": 8, "proj_refresh": 7, "warmup_steps": 12, **options}
    )


def advance(optimizer, params, steps):
    for step in steps:
        for i, p in enumerate(params.values()):
            p.grad = random(p.shape, 100 * step + i).to(p.dtype)
        optimizer.step()


def through_torch(optimizer, resumed):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))


def through_safetensors(optimizer, resumed):
    tensors, meta = optimizer.named_state()
    resumed.load_named_state(load(save(tensors)), json.loads(json.dumps(meta)))


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "split16"])
@pytest.mark.parametrize("carry", [through_torch, through_safetensors])
def test_resume_between_two_refreshes_is_bit_identical(carry, rounding):
    straight = model()
    whole = build(straight, rounding=rounding, seed=11)
    advance(whole, straight, range(10))
    halfway = {n: nn.Parameter(p.detach().clone()) for n, p in straight.items()}
    resumed = build(halfway, rounding=rounding, seed=99, lr=5.0)
    carry(whole, resumed)
    assert resumed.step_count == 10
    assert resumed.seed == 11
    assert [g["lr"] for g in resumed.param_groups] == [1e-3, 1e-3]
    assert [g["weight_decay"] for g in resumed.param_groups] == [0.01, 0.0]
    advance(whole, straight, range(10, 20))
    advance(resumed, halfway, range(10, 20))
    assert all(torch.equal(straight[n], halfway[n]) for n in straight)
    (left, left_meta), (right, right_meta) = whole.named_state(), resumed.named_state()
    assert left_meta == right_meta
    assert all(torch.equal(left[n], right[n]) for n in left)


def test_the_skip_counter_is_carried_on():
    params = model()
    optimizer = build(params)
    advance(optimizer, params, range(1))
    params["a"].grad[0, 0] = float("nan")
    optimizer.step()
    resumed = build(model())
    through_torch(optimizer, resumed)
    assert resumed.skipped_nonfinite == 1


def test_the_state_is_tensors_of_known_names_and_plain_metadata():
    params = model()
    tensors, meta = build(params, rounding="split16").named_state()
    parts = {"a": "m v norm step low", "norm": "m v step low"}
    for name, expected in parts.items():
        found = {key.split(".")[0] for key in tensors if key.split(".", 1)[1] == name}
        assert found == set(expected.split())
    assert tensors["m.a"].shape == (8, 40)
    assert tensors["v.b"].shape == (8, 40)
    assert tensors["m.experts"].shape == (3, 8, 16)
    assert tensors["norm.experts"].shape == tensors["step.experts"].shape == (3,)
    assert tensors["m.norm"].shape == (40,)
    assert {tensors[k].dtype for k in ("m.a", "v.a", "norm.a", "m.norm")} == {torch.float32}
    assert json.loads(json.dumps(meta)) == meta
    assert meta["version"] == 1
    assert meta["parameters"]["b"] == {"shape": [40, 24], "dtype": "bfloat16", "rank": 8}
    assert meta["parameters"]["norm"]["rank"] is None


def test_state_size_is_exact_and_constant():
    params = model()
    optimizer = build(params)
    matrices = 2 * 4 * (8 * 40 + 8 * 40 + 3 * 8 * 16) + (4 + 8) * (1 + 1 + 3)
    vector = 2 * 4 * 40 + 8
    assert optimizer.state_size_bytes() == matrices + vector
    advance(optimizer, params, range(2))
    assert optimizer.state_size_bytes() == matrices + vector
    split = build(model(), rounding="split16").state_size_bytes()
    assert split == matrices + vector + 2 * sum(p.numel() for p in params.values())


def _change_meta(key, value):
    def change(tensors, meta):
        meta[key] = value

    return change


def _drop_meta(tensors, meta):
    del meta["step_count"]


def _parameter(name, key, value):
    def change(tensors, meta):
        meta["parameters"][name][key] = value

    return change


def _rename(tensors, meta):
    meta["parameters"]["other.weight"] = meta["parameters"].pop("experts")


def _moments_in_bfloat16(tensors, meta):
    tensors["v.b"] = tensors["v.b"].bfloat16()


def _wrong_shape(tensors, meta):
    tensors["m.b"] = tensors["m.b"][:4]


def _missing(tensors, meta):
    del tensors["norm.experts"]


def _left_over(tensors, meta):
    tensors["m.other"] = torch.zeros(3)


def _groups(tensors, meta):
    meta["param_groups"] = meta["param_groups"][:1]


def _regrouped(tensors, meta):
    names = meta["param_groups"][0]["param_names"]
    meta["param_groups"][1]["param_names"].append(names.pop(names.index("a")))


def _bad_lr(tensors, meta):
    meta["param_groups"][1]["lr"] = float("nan")


REFUSALS = [
    (_change_meta("format", "other"), "not a state of this optimizer"),
    (_drop_meta, "missing: .*step_count"),
    (_change_meta("version", 2), "version is 2"),
    (_change_meta("seed", "x"), "seed is 'x'"),
    (_change_meta("step_count", -1), "step_count is -1"),
    (_change_meta("variant", "mini"), "variant is 'mini'"),
    (_change_meta("compat", "apollo-torch"), "compat is 'apollo-torch'"),
    (_change_meta("rounding", "split16"), "rounding is 'split16'"),
    (_parameter("b", "rank", 16), "'b' has rank 16"),
    (_parameter("b", "shape", [40, 40]), r"'b' has shape \[40, 40\]"),
    (_parameter("norm", "dtype", "float32"), "'norm' has dtype float32"),
    (_rename, "(?:'experts' is not in it|parameter 'other.weight')"),
    (_moments_in_bfloat16, "'v.b' is torch.bfloat16"),
    (_wrong_shape, r"'m.b' is \[4, 40\], not \[8, 40\]"),
    (_missing, "'norm.experts' is missing"),
    (lambda tensors, _: tensors.clear(), "is missing"),
    (_left_over, "'m.other' belongs to no parameter"),
    (_groups, "1 parameter groups"),
    (_regrouped, "parameter 'a' is not in group 0"),
    (_bad_lr, "group 1, lr is nan"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_a_foreign_state_is_refused_and_nothing_changes(change, message):
    source_params, params = model(), model()
    source, optimizer = build(source_params), build(params, seed=3)
    advance(source, source_params, range(3))
    advance(optimizer, params, range(2))
    tensors, meta = source.named_state()
    tensors, meta = dict(tensors), json.loads(json.dumps(meta))
    change(tensors, meta)
    live, before_meta = optimizer.named_state()
    before = {n: t.clone() for n, t in live.items()}
    with pytest.raises(ValueError, match=message) as caught:
        optimizer.load_named_state(tensors, meta)
    assert "Nothing was changed" in str(caught.value)
    after, after_meta = optimizer.named_state()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert after_meta == before_meta


def test_a_state_at_step_0_needs_no_tensors():
    params, new_params = model(), model()
    optimizer, new = build(params), build(new_params)
    advance(optimizer, params, range(3))
    optimizer.load_named_state({}, new.named_state()[1])
    (tensors, meta), (expected, expected_meta) = optimizer.named_state(), new.named_state()
    assert meta == expected_meta
    assert all(torch.equal(tensors[n], expected[n]) for n in expected)


def test_a_state_of_another_optimizer_is_refused():
    adam = torch.optim.AdamW(model().values())
    with pytest.raises(ValueError, match="has no 'apollo'"):
        build(model()).load_state_dict(adam.state_dict())


def test_moments_stay_float32_over_bfloat16_weights():
    params = model()
    source = build(params)
    advance(source, params, range(2))
    resumed = build(model())
    resumed.load_state_dict(source.state_dict())
    for p in resumed.param_groups[0]["params"]:
        assert resumed.state[p]["m"].dtype == resumed.state[p]["v"].dtype == torch.float32


def test_loading_copies():
    params = model()
    source = build(params)
    advance(source, params, range(2))
    tensors, meta = source.named_state()
    resumed_params = model()
    resumed = build(resumed_params)
    resumed.load_named_state(tensors, meta)
    kept = {n: t.clone() for n, t in tensors.items()}
    advance(resumed, resumed_params, range(2, 4))
    assert all(torch.equal(kept[n], t) for n, t in source.named_state()[0].items())


def test_results_do_not_depend_on_the_order_of_the_parameters():
    forward, backward = model(), model()
    first = Apollo(list(forward.items()), lr=1e-3, rank=8)
    second = Apollo(list(backward.items())[::-1], lr=1e-3, rank=8)
    advance(first, forward, range(3))
    advance(second, backward, range(3))
    assert all(torch.equal(forward[n], backward[n]) for n in forward)
