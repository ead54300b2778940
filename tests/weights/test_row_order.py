"""A weight whose rows vLLM keeps in another order computes and is read as in the directory."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.region import Region
from apollo_trainer.weights.checkpoint_plan import plan_checkpoint
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from apollo_trainer.weights.live_model import fill_with_views, meta_model
from apollo_trainer.weights.row_order import reorder_outputs
from examples.byte_model import write_model

IDS = torch.arange(40).view(2, 20) * 6 % 259
QUERY = "model.layers.0.self_attn.q_proj"
BOTH = (f"{QUERY}.weight", f"{QUERY}.bias")


@pytest.fixture
def directory(tmp_path, config):
    return write_model(tmp_path, config(attention_bias=True), seed=3)


def orders(names, size=32):
    """A seeded order of rows, the same one for each name."""
    rows = torch.randperm(size, generator=torch.Generator().manual_seed(5)).tolist()
    return dict.fromkeys(names, tuple(rows))


class Reordered:
    """The training model of a directory over copies of its weights, some in another order."""

    def __init__(self, directory, rows):
        self.original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.model = meta_model(str(directory))
        plan = plan_checkpoint(self.model)
        values = {n: p.detach().clone() for n, p in self.original.named_parameters()}
        live = {n: v[list(rows[n])] if n in rows else v for n, v in values.items()}
        fill_with_views(self.model, plan, live)
        self.plan, self.regions = plan, {n: region(v, rows.get(n)) for n, v in live.items()}
        reorder_outputs(self.model, plan, self.regions)

    def reader(self):
        return CheckpointReader(self.plan, dict(self.model.named_parameters()), self.regions)


def region(tensor, rows):
    whole = Region.whole_of(tensor.shape)
    return Region(whole.root, (tuple((r, 1) for r in rows), *whole.runs[1:])) if rows else whole


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_the_model_computes_what_the_directory_holds(directory):
    found = Reordered(directory, orders(BOTH))
    assert torch.equal(logits(found.model), logits(found.original))
    assert torch.equal(logits(copy.deepcopy(found.model)), logits(found.original))


def test_without_the_hook_it_would_not(directory):
    found = Reordered(directory, orders(BOTH))
    module = found.model.get_submodule(QUERY)
    module._forward_hooks.clear()
    assert not torch.allclose(logits(found.model), logits(found.original))


def test_each_checkpoint_tensor_is_read_as_the_directory_has_it(directory):
    found = Reordered(directory, orders(BOTH))
    values, reader = dict(found.original.named_parameters()), found.reader()
    for name in reader.names():
        assert torch.equal(reader.read(name), values[name]), name


def test_an_update_reaches_the_rows_that_it_is_of(directory):
    found = Reordered(directory, orders(BOTH))
    for model in (found.model, found.original):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    values, reader = dict(found.original.named_parameters()), found.reader()
    for name in BOTH:
        torch.testing.assert_close(reader.read(name), values[name])


@pytest.mark.parametrize(
    "rows",
    [
        orders(["model.norm.weight"]),
        orders(["model.embed_tokens.weight"], 259),
        orders(BOTH[:1]),
        orders(BOTH[1:]),
        orders(BOTH) | {BOTH[1]: tuple(range(31, -1, -1))},
    ],
    ids=["a norm", "tied", "a weight without its bias", "a bias", "two orders"],
)
def test_what_a_hook_cannot_put_in_order_is_refused_by_name(directory, rows):
    with pytest.raises(FailedPrecondition, match=next(iter(rows))) as error:
        Reordered(directory, rows)
    assert error.value.reason == "ROWS_REORDERED"
    assert "Nothing was written." in error.value.message
