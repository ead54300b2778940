"""What a step needs is told before it is taken: of tensors without memory, as of those with it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from apollo_trainer.optim import Apollo
from apollo_trainer.training import memory as told
from apollo_trainer.training.allocator import Allocations, CachingAllocator
from apollo_trainer.training.batch import Mixing, plan_batches
from apollo_trainer.training.bucketed import Bucket, Inputs, losses
from apollo_trainer.training.captured import CapturedPasses
from apollo_trainer.training.delta_rule import choose_delta_rule
from apollo_trainer.training.faster import speed_up
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.gradients import StepGradients
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.memory import StepMemory
from apollo_trainer.training.needs import CANNOT, StepShape
from apollo_trainer.training.options import StateShape
from apollo_trainer.training.step import take_step
from apollo_trainer.training.twin import twin_of

Make = Callable[[str], Any]
BUDGET = 1024
SHAPES = [StepShape(4, 3), StepShape(2, 20), StepShape(30, 12), StepShape(9, 5, samples=3)]
EXPERTS = "qwen3_moe"
# With more tokens the gradients of so few experts are made, one by one by how many each has.
CASES = [(EXPERTS, SHAPES[0]), *((f, s) for f in ("qwen3", "gpt2", "gemma2") for s in SHAPES)]


def passes(model: Any, shape: StepShape, bucketed: bool) -> tuple[int, int]:
    """Peak of a micro-batch's passes, and what they leave; bytes."""
    (batch,) = plan_batches(shape.of_samples(), BUDGET, Mixing.PADDED)
    inputs = Inputs(Bucket.of(batch), model.device)
    if not inputs.targets.weights.is_meta:
        inputs.fill(batch, 1.0)
    gc.collect()
    with Allocations(CachingAllocator(), model.device.type) as seen:
        gradients = StepGradients(model.parameters())
        with gradients.collecting():
            if bucketed:
                loss = losses(model, inputs)[0]
            else:
                loss, _ = batch_loss(model, batch, FrozenContexts(model))
            torch.autograd.backward([loss])
        del loss
        return seen.peak, seen.live


@pytest.mark.parametrize("bucketed", [False, True], ids=["as it is", "bucketed"])
@pytest.mark.parametrize(("family", "shape"), CASES, ids=str)
def test_passes_without_memory_take_what_passes_with_it_take(
    make_model: Make, family: str, shape: StepShape, bucketed: bool
) -> None:
    # Experts multiply together in bfloat16; a norm keeps bfloat16 on a CPU alone.
    model = make_model(family).to(torch.bfloat16 if family == EXPERTS else torch.float32)
    # torch's own attention chooses by device what it keeps.
    model.set_attn_implementation("eager")
    passes(model, shape, bucketed)  # what is made once is made
    assert passes(twin_of(model), shape, bucketed) == passes(model, shape, bucketed)


@pytest.mark.parametrize("variant", ["channel", "mini"])
@pytest.mark.parametrize("rounding", ["stochastic", "split16"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_moe"])
def test_weights_and_state_are_told_to_the_byte(
    make_model: Make, family: str, rounding: Any, variant: Any
) -> None:
    model = make_model(family).bfloat16()
    optimizer = Apollo(model.named_parameters(), rank=8, rounding=rounding, variant=variant)
    memory = StepMemory(twin_of(model), StateShape(8, variant, rounding), BUDGET)
    assert memory.state_bytes == optimizer.state_size_bytes()
    assert memory.weights_bytes == sum(p.nbytes for p in model.parameters())


def test_longer_steps_need_more_and_a_step_is_told_the_same_each_time(make_model: Make) -> None:
    memory = StepMemory(twin_of(make_model("qwen3").bfloat16()), StateShape(8), 10**6)
    shapes = [StepShape(20, 10), StepShape(400, 10), StepShape(400, 800), StepShape(400, 800, 3)]
    needs = [memory.step_bytes(shape.of_samples()) for shape in shapes]
    assert needs == sorted(needs) and needs[0] < needs[-1]
    assert needs == [memory.step_bytes(shape.of_samples()) for shape in shapes]


def test_a_step_without_a_frozen_context_is_told_of(make_model: Make) -> None:
    memory = StepMemory(twin_of(make_model("qwen3").bfloat16()), StateShape(8), BUDGET)
    need, more = (memory.step_bytes(StepShape(n, 200, 8).of_samples()) for n in (1, 300))
    assert 0 < need < more


def test_experts_are_told_of_while_their_gradients_are_factors(make_model: Make) -> None:
    memory = StepMemory(twin_of(make_model(EXPERTS).bfloat16()), StateShape(8), BUDGET)
    assert memory.step_bytes(StepShape(20, 10).of_samples()) > 0
    with pytest.raises(CANNOT):
        memory.step_bytes(StepShape(20, 500).of_samples())


def test_micro_batches_of_one_step_share_a_graph(make_model: Make) -> None:
    memory = StepMemory(twin_of(make_model("qwen3").bfloat16()), StateShape(8), 10**6)
    (one,) = plan_batches(StepShape(300, 200, 4).of_samples(), 10**6, Mixing.PADDED)
    alone = memory.captured([one])
    assert alone <= memory.captured([one, one]) < 2 * alone


def test_nothing_is_told_where_it_cannot_be_known(make_model: Make) -> None:
    model = make_model("qwen3")
    with pytest.raises(ValueError, match="float16"):
        StepMemory(twin_of(model.half()), StateShape(8), BUDGET)
    model = make_model("qwen3")
    model.model.norm.register_forward_hook(lambda *a: float(a[2].sum()) and None)
    with pytest.raises(CANNOT):
        StepMemory(twin_of(model), StateShape(8), BUDGET)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "shape", [StepShape(256, 64), StepShape(1800, 200), StepShape(64, 64, 16)], ids=str
)
def test_a_device_reserves_what_is_told(shape: StepShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its allocator alone: code and a graph's kernels are no tensors."""
    monkeypatch.setattr(told, "KERNEL_BYTES", 0)
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=32768, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    choose_delta_rule(model)
    speed_up(model)
    optimizer, graphs = Apollo(model.named_parameters(), rank=64), CapturedPasses(model)
    optimizer.measure = True

    def step(of: StepShape, count: int) -> None:
        for _ in range(count):
            take_step(model, optimizer, of.of_samples(), passes=graphs)

    step(StepShape(20, 10), 3)  # workspaces of cuBLAS are there from now on
    graphs.let_go()
    optimizer._steppers.clear()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    batches = plan_batches(shape.of_samples(), BUDGET, Mixing.PADDED)
    expected = StepMemory(twin_of(model), StateShape(), BUDGET).captured(batches)
    step(shape, 4)
    assert len(graphs) == 1, graphs.refusal
    reserved = torch.cuda.memory_reserved() - before
    assert reserved == pytest.approx(expected, rel=0.1), f"{reserved} reserved, {expected} told"
