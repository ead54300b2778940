"""A parameter whose rows vLLM's loader puts into another order is a view with that order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_sidecar.memfd_weights import MemfdWeights
from apollo_sidecar.shadow_load import trace_checkpoint_map
from tests.sidecar.loaders import Loading, Single, plan, weight

QUICK = settings(deadline=None, max_examples=40, derandomize=True)
HEADS, WIDTH, HIDDEN = 3, 4, 5
ROWS = 3 * HEADS * WIDTH


class Fused(Loading):
    """q, k and v in one weight and bias, which the checkpoint has in another order."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(3)
        self.qkv, self.qkv_bias, self._order = weight(ROWS, HIDDEN), weight(ROWS), order

    def load_w(self, tensor):
        self.qkv.data.copy_(self._order(tensor))

    def load_b(self, tensor):
        self.qkv_bias.data.copy_(self._order(tensor))


def as_bloom(tensor):
    """A head's q, k and v lie together in the checkpoint."""
    split = tensor.view(HEADS, 3, WIDTH, *tensor.shape[1:])
    return split.transpose(0, 1).reshape(tensor.shape)


def as_llama4(tensor):
    """Pairs of a rotary embedding lie beside each other in the checkpoint."""
    split = tensor.view(3 * HEADS, WIDTH // 2, 2, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


def as_falcon(tensor):
    """Groups of queries with their key and value, put together anew."""
    split = tensor.view(HEADS, 3, WIDTH, *tensor.shape[1:])
    parts = split[:, :-2], split[:, [-2]], split[:, [-1]]
    return torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts])


def traced(module, shapes):
    live = MemfdWeights(module)
    before = bytes(live.storages[0])
    answer = trace_checkpoint_map(module, live, plan(shapes))
    assert bytes(live.storages[0]) == before, "the live weights were touched"
    return answer


def live_rows(module, view):
    """The live weights at a view."""
    tensor = dict(module.named_parameters())[view.tensor]
    flat = torch.empty(0).set_(tensor.untyped_storage())
    return flat.as_strided(tuple(view.shape), tuple(view.stride), view.offset_bytes // 4)


def rows_of(view):
    """Which row of the parameter each of the view's is."""
    if not view.runs:
        return list(range(view.shape[0]))
    runs = zip(view.runs[0].starts, view.runs[0].counts, strict=True)
    return [start + i for start, count in runs for i in range(count)]


@pytest.mark.parametrize("order", [as_bloom, as_llama4, as_falcon])
def test_each_row_of_the_view_is_the_row_that_the_answer_names(order):
    module = Fused(order)
    answer = traced(module, {"w": (ROWS, HIDDEN), "b": (ROWS,)})
    assert not answer.refused
    for view in answer.views:
        checkpoint = torch.randn(*view.shape)
        with torch.no_grad():
            module.load_weights([(view.name, checkpoint)])
        assert torch.equal(live_rows(module, view), checkpoint[rows_of(view)])
    assert {view.tensor for view in answer.views} == {"qkv", "qkv_bias"}


@given(rows=st.permutations(range(4)), cut=st.integers(0, 4))
@QUICK
def test_any_order_is_found_whichever_way_it_is_loaded(rows, cut):
    def load(module, tensor):
        rearranged = torch.cat([tensor[i : i + 1] for i in rows])
        module.weight.data[:cut].copy_(rearranged[:cut])
        module.weight.data[cut:].copy_(rearranged[cut:])

    (view,) = traced(Single(load), {"w": (4, 6)}).views
    assert rows_of(view) == rows
    assert (rows == [0, 1, 2, 3]) == (not view.runs)


def over_two_tensors(module, tensor):
    rearranged = torch.cat([tensor[2:], tensor[:2]])
    module.weight.data[:2].copy_(rearranged[:2])
    module.other.data[:2].copy_(rearranged[2:])


def written_over(module, tensor):
    module.weight.data.copy_(tensor.flip(0))
    module.weight.data[1].zero_()


NO_ORDER = {
    "columns in another order": lambda m, t: m.weight.data.copy_(t.flip(1)),
    "a row twice": lambda m, t: m.weight.data.copy_(t[[0, 1, 1, 3]]),
    "rows scaled": lambda m, t: m.weight.data.copy_(t.flip(0) * 2),
    "rows shifted": lambda m, t: m.weight.data.copy_(t.flip(0) + 1),
    "rows rounded": lambda m, t: m.weight.data.copy_(t.flip(0).bfloat16()),
    "rows of halves": lambda m, t: m.weight.data.copy_(t.view(8, 3).flip(0).view(4, 6)),
    "two tensors": over_two_tensors,
    "written over": written_over,
    "two places": lambda m, t: [m.weight.data.copy_(t.flip(0)), m.other.data.copy_(t.flip(0))],
}


@pytest.mark.parametrize("way", NO_ORDER)
def test_what_is_no_order_of_whole_rows_is_refused(way):
    answer = traced(Single(NO_ORDER[way]), {"w": (4, 6)})
    assert [refused.name for refused in answer.refused] == ["w"]
    assert not answer.views


def test_rows_of_which_one_is_left_out_are_told_as_such():
    """As a worker of several loads them; whether others have the rest, the server finds out."""
    (view,) = traced(
        Single(lambda m, t: m.weight.data[:3].copy_(t[[3, 1, 0]])), {"w": (4, 6)}
    ).views
    assert (rows_of(view), list(view.shape)) == ([3, 1, 0], [3, 6])


def test_a_loader_that_fails_on_numbers_refuses_the_parameter_for_what_it_was():
    def load(module, tensor):
        assert tensor.is_meta, "it takes no numbers"
        module.weight.data.copy_(tensor.flip(0))

    (refused,) = traced(Single(load), {"w": (4, 6)}).refused
    assert "puts together from it" in refused.reason
