"""Each training parameter is found in modules that load the way vLLM's do, or refused by name."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from apollo_sidecar.memfd_weights import MemfdWeights
from apollo_sidecar.shadow_load import trace_checkpoint_map
from tests.sidecar.loaders import (
    EXPERTS,
    HEADS,
    HIDDEN,
    INNER,
    KV,
    VOCAB,
    FusedQkv,
    Loading,
    PaddedVocabulary,
    Single,
    Stacked,
    Transposed,
    plan,
    weight,
)


class Traced:
    """The answer for a module, and its live weights to look the views up in."""

    def __init__(self, module, request):
        torch.manual_seed(0)
        self.module, self.live = module, MemfdWeights(module)
        before = bytes(self.live.storages[0])
        self.answer = trace_checkpoint_map(module, self.live, request)
        assert bytes(self.live.storages[0]) == before, "the live weights were touched"
        self.views = {view.name: view for view in self.answer.views}
        self.refused = {refused.name: refused.reason for refused in self.answer.refused}

    def tensor(self, name):
        view = self.views[name]
        dtype = getattr(torch, view.dtype)
        offset, remainder = divmod(view.offset_bytes, dtype.itemsize)
        assert remainder == 0
        empty = torch.empty(0, dtype=dtype)
        return empty.set_(self.live.storages[0], offset, tuple(view.shape), tuple(view.stride))


def test_fused_rows_are_found_by_their_place():
    shapes = {"q": (HEADS, HIDDEN), "k": (KV, HIDDEN), "v": (KV, HIDDEN)}
    traced = Traced(FusedQkv(), plan(shapes))
    q, k, v = traced.module.qkv.split([HEADS, KV, KV])
    for name, expected in {"q": q, "k": k, "v": v}.items():
        assert torch.equal(traced.tensor(name), expected)
        assert traced.views[name].tensor == "qkv"
    assert traced.refused == {}


def test_one_parameter_cut_into_three_checkpoint_tensors_is_one_view():
    rows = [("q", 0, HEADS), ("k", HEADS, KV), ("v", HEADS + KV, KV)]
    tensors = [(name, "qkv", at * HIDDEN, (n, HIDDEN), None) for name, at, n in rows]
    traced = Traced(FusedQkv(), plan({"qkv": (HEADS + 2 * KV, HIDDEN)}, tensors))
    assert torch.equal(traced.tensor("qkv"), traced.module.qkv)


def test_a_parameter_whose_parts_vllm_stores_in_another_order_is_told_with_that_order():
    rows = [("k", 0, KV), ("q", KV, HEADS), ("v", HEADS + KV, KV)]
    tensors = [(name, "kqv", at * HIDDEN, (n, HIDDEN), None) for name, at, n in rows]
    traced = Traced(FusedQkv(), plan({"kqv": (HEADS + 2 * KV, HIDDEN)}, tensors))
    (rows, columns) = traced.views["kqv"].runs
    assert (list(rows.starts), list(rows.counts)) == ([KV, 0, KV + HEADS], [HEADS, KV, KV])
    assert (list(columns.starts), list(columns.counts)) == ([0], [HIDDEN])


def test_a_bias_is_found_beside_its_weight():
    traced = Traced(FusedQkv(), plan({"k": (KV,)}))
    assert torch.equal(traced.tensor("k"), traced.module.qkv_bias[HEADS : HEADS + KV])


def test_a_transposed_weight_is_a_transposed_view():
    traced = Traced(Transposed(), plan({"w": (3, 5)}))
    assert torch.equal(traced.tensor("w"), traced.module.weight.t())


def test_experts_are_one_view_of_what_vllm_stacks():
    shapes = {"gate_up": (EXPERTS, 2 * INNER, HIDDEN), "down": (EXPERTS, HIDDEN, INNER)}
    tensors = []
    for e in range(EXPERTS):
        start = e * 2 * INNER * HIDDEN
        tensors += [
            (f"{e}.gate", "gate_up", start, (INNER, HIDDEN), None),
            (f"{e}.up", "gate_up", start + INNER * HIDDEN, (INNER, HIDDEN), None),
            (f"{e}.down", "down", e * HIDDEN * INNER, (HIDDEN, INNER), None),
        ]
    traced = Traced(Stacked(), plan(shapes, tensors))
    assert torch.equal(traced.tensor("gate_up"), traced.module.w13)
    assert torch.equal(traced.tensor("down"), traced.module.w2)
    missing = Traced(Stacked(), plan(shapes, tensors[:-1]))
    assert list(missing.views["down"].runs[0].counts) == [EXPERTS - 1]
    assert not missing.views["gate_up"].runs


def test_a_padded_tied_vocabulary_is_its_first_rows():
    traced = Traced(PaddedVocabulary(), plan({"embed": (VOCAB, HIDDEN)}))
    assert torch.equal(traced.tensor("embed"), traced.module.embed[:VOCAB])


def test_bfloat16_weights_beside_a_float32_one_keep_their_dtypes():
    class Mixed(Loading):
        def __init__(self):
            super().__init__()
            self.gain = weight(3)
            self.weight = nn.Parameter(torch.randn(4, 6).bfloat16())

        def load_g(self, tensor):
            self.gain.data.copy_(tensor)

        def load_w(self, tensor):
            self.weight.data.copy_(tensor.to(torch.bfloat16))

    traced = Traced(Mixed(), plan({"g": (3,), "w": (4, 6)}))
    assert traced.views["w"].dtype == "bfloat16"
    assert torch.equal(traced.tensor("w"), traced.module.weight)
    assert torch.equal(traced.tensor("g"), traced.module.gain)


def two_places(module, tensor):
    module.weight.data[:2].copy_(tensor[:2])
    module.other.data[2:].copy_(tensor[2:])


def changed_in_place_first(module, tensor):
    tensor += 1
    module.weight.data.copy_(tensor)


def copied_then_computed_over(module, tensor):
    module.weight.data.copy_(tensor)
    module.weight.data.copy_(tensor + 1)


REFUSED = [
    (lambda m, t: m.weight.data.copy_(t).mul_(2), r"changes it after the copy \(mul_\)"),
    (lambda m, t: m.weight.data.copy_(t)[0].zero_(), r"changes it after the copy \(zero_\)"),
    (copied_then_computed_over, r"changes it after the copy \(copy_\)"),
    (changed_in_place_first, "values that it computes"),
    (lambda m, t: m.weight.data.copy_(-t.exp()), "values that it computes"),
    (lambda m, t: m.weight.data.copy_(torch.cat([t[:, 2:], t[:, :2]], 1)), "puts together from it"),
    (lambda m, t: m.weight.data.mul_(t), "values that it computes"),
    (lambda m, t: None, "copies no part of it"),
    (lambda m, t: [m.weight.data[i, i:].copy_(t[i, i:]) for i in (0, 1)], "only 11 of its 24"),
    (lambda m, t: m.weight.data.copy_(t[0]), "several places"),
    (lambda m, t: [m.weight.data.copy_(t), m.other.data.copy_(t)], "more than one place"),
    (two_places, "spread over several tensors|one set of strides"),
    (lambda m, t: m.weight.data.copy_(t.view(4, 3, 2).mT.reshape(4, 6)), "rearranges its elem"),
    (lambda m, t: m.absent, "loader failed.*AttributeError"),
]  # fmt: skip


COMPUTED = {
    "exponential": lambda m, t: m.weight.data.copy_(-t.exp()),
    # As vLLM's `composed_weight_loader`, by which Mamba 2's A_log is loaded.
    "of the copy": lambda m, t: m.weight.data.copy_(t).copy_(-torch.exp(m.weight.data.float())),
    "in place": lambda m, t: m.weight.data.copy_(t).mul_(2),
    "scalar": lambda m, t: m.weight.data.fill_((t[0, 0] * 2).item()),
}
COPIED = {
    "one row changed": lambda m, t: m.weight.data.copy_(t)[0].zero_(),
    "every other row changed": lambda m, t: m.weight.data.copy_(t)[::2].mul_(2),
    "twice": lambda m, t: [m.weight.data.copy_(t), m.other.data.copy_(t)],
    "not at all": lambda m, t: None,
    "other order in a row": lambda m, t: m.weight.data.copy_(t.view(4, 3, 2).mT.reshape(4, 6)),
}


@pytest.mark.parametrize("way", [*COMPUTED, *COPIED])
def test_it_is_told_whether_all_that_is_written_is_computed(way):
    traced = Traced(Single((COMPUTED | COPIED)[way]), plan({"w": (4, 6)}))
    (refused,) = traced.answer.refused
    assert refused.computed == (way in COMPUTED)


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_a_parameter_that_is_no_view_is_refused_with_the_reason(number):
    load, reason = REFUSED[number]
    traced = Traced(Single(load), plan({"w": (4, 6)}))
    assert traced.views == {}
    assert re.search(reason, traced.refused["w"])


def test_what_is_copied_beside_what_is_computed_is_told_as_a_part():
    def load(module, tensor):
        module.weight.data[:3].copy_(tensor[:3])
        module.weight.data[3].copy_(-tensor[3])

    view = Traced(Single(load), plan({"w": (4, 6)})).views["w"]
    assert (list(view.shape), list(view.runs[0].counts)) == ([3, 6], [3])


def test_a_loader_that_rearranges_one_parameter_leaves_the_others_found():
    class Interleaved(FusedQkv):
        def __init__(self):
            super().__init__()
            self.gate = weight(4, HIDDEN)

        def load_gate(self, tensor):
            """Its columns are in another order, which is none of rows."""
            self.gate.data.copy_(tensor.view(4, HIDDEN // 2, 2).mT.reshape(4, HIDDEN))

    traced = Traced(Interleaved(), plan({"q": (HEADS, HIDDEN), "gate": (4, HIDDEN)}))
    assert set(traced.views) == {"q"}
    assert "rearranges its elements" in traced.refused["gate"]


def test_writes_before_the_copy_or_beside_it_do_not_matter():
    def load(module, tensor):
        module.weight.data.zero_()
        module.weight.data.copy_(tensor)
        module.other.data.mul_(2)

    traced = Traced(Single(load), plan({"w": (4, 6)}))
    assert torch.equal(traced.tensor("w"), traced.module.weight)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_parameter_of_one_element_is_a_view(shape):
    class Gains(Loading):
        """As vLLM's default loader: by the element's value."""

        def __init__(self):
            super().__init__()
            self.first, self.second = weight(*shape), weight(1)

        def load_first(self, tensor):
            self.first.data.fill_(tensor.item())

        def load_second(self, tensor):
            self.second.data.fill_(tensor.item())

    traced = Traced(Gains(), plan({"second": (1,), "first": shape}))
    assert torch.equal(traced.tensor("first"), traced.module.first)
    assert torch.equal(traced.tensor("second"), traced.module.second)


class MadeAnew(Loading):
    """Makes its bias when it is loaded, as vLLM's Transformers backend does for a head."""

    def __init__(self):
        super().__init__()
        self.bias, self.rows = weight(6), 6

    def load_b(self, tensor):
        self.bias = weight(self.rows)
        self.bias.weight_loader = "an attribute that a parameter can be given once"
        self.bias.data[: tensor.shape[0]].copy_(tensor)


def test_a_parameter_that_the_loader_makes_anew_is_the_live_one():
    module = MadeAnew()
    before = module.bias
    traced = Traced(module, plan({"b": (4,)}))
    assert torch.equal(traced.tensor("b"), before[:4])
    assert module.bias is before


def test_a_parameter_made_anew_in_another_shape_is_refused_and_the_module_stays_whole():
    module = MadeAnew()
    before, module.rows = module.bias, 9
    traced = Traced(module, plan({"b": (4,)}))
    assert set(traced.refused) == {"b"}
    assert module.bias is before
    assert dict(module.named_parameters()).keys() == {"bias"}


def test_a_refused_parameter_leaves_the_others_found():
    class Half(FusedQkv):
        def load_v(self, tensor):
            self.qkv.data.narrow(0, HEADS + KV, KV).copy_(tensor * 2)

    traced = Traced(Half(), plan({"q": (HEADS, HIDDEN), "v": (KV, HIDDEN)}))
    assert (set(traced.views), set(traced.refused)) == ({"q"}, {"v"})
