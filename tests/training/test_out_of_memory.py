"""A step without enough memory is not begun, says what to lower, and leaves the next one alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from apollo_trainer.optim import Apollo
from apollo_trainer.training.context_check import require_frozen_context
from apollo_trainer.training.evaluate import evaluate
from apollo_trainer.training.out_of_memory import OutOfMemory
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import StepPolicy, take_step

Make = Callable[[str], Any]
ONE = TokenizedSample((3, 50, 7, 99), (140, 2, 77, 30))
OTHER = TokenizedSample((11, 12), (13, 14))


def ask_the_allocator(*_: Any) -> None:
    """More than any machine can address, whatever it promises: torch's own allocator refuses."""
    torch.empty(2**62, dtype=torch.uint8)


def no_memory_on_the_device(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_memory_in_python(*_: Any) -> None:
    raise MemoryError


FAILURES = [ask_the_allocator, no_memory_on_the_device, no_memory_in_python]
POLICIES = [StepPolicy(), StepPolicy(token_budget=4)]


def in_the_forward(model: Any, fail: Callable[..., None]) -> Any:
    return model.model.norm.register_forward_pre_hook(fail)


def in_the_backward(model: Any, fail: Callable[..., None]) -> Any:
    return model.model.layers[0].mlp.down_proj.register_full_backward_hook(fail)


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("policy", POLICIES, ids=["at once", "in micro-batches"])
@pytest.mark.parametrize("where", [in_the_forward, in_the_backward])
def test_nothing_is_written_and_the_next_step_works(
    make_model: Make, where: Any, policy: StepPolicy, fail: Callable[..., None]
) -> None:
    model = make_model("qwen3")
    optimizer = Apollo(model.named_parameters(), rank=8)
    before = [p.detach().clone() for p in model.parameters()]
    take_step(model, optimizer, [ONE, OTHER], StepPolicy(dry_run=True))
    hook = where(model, fail)
    with pytest.raises(OutOfMemory):
        take_step(model, optimizer, [ONE, OTHER], policy)
    hook.remove()
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.step_count == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert take_step(model, optimizer, [ONE, OTHER], policy).optimizer_step == 1


@pytest.mark.parametrize("fail", FAILURES)
def test_the_first_try_of_several_samples_tells_it_too(
    make_model: Make, fail: Callable[..., None]
) -> None:
    model = make_model("qwen3")
    optimizer = Apollo(model.named_parameters(), rank=8)
    hook = in_the_forward(model, fail)
    for use in (
        lambda: take_step(model, optimizer, [ONE, OTHER]),
        lambda: evaluate(model, [ONE, OTHER]),
        lambda: require_frozen_context(model, list(range(20, 50))),
    ):
        with pytest.raises(OutOfMemory, match=r"a few tokens; nothing was written\. Lower"):
            use()
    hook.remove()
    assert take_step(model, optimizer, [ONE, OTHER]).micro_batches == 1


def test_the_error_names_what_to_lower_with_the_numbers(make_model: Make) -> None:
    model = make_model("qwen3")
    optimizer = Apollo(model.named_parameters(), rank=8)
    take_step(model, optimizer, [ONE, OTHER], StepPolicy(dry_run=True))
    in_the_backward(model, no_memory_on_the_device)
    with pytest.raises(OutOfMemory) as caught:
        take_step(model, optimizer, [ONE, OTHER], StepPolicy(token_budget=100))
    assert caught.value.reason == "OUT_OF_MEMORY"
    assert "4 continuation tokens (1 samples of up to 4" in caught.value.message
    assert "token budget is 4." in caught.value.message
    assert caught.value.metadata == {
        "largest_micro_batch_tokens": "4",
        "samples": "1",
        "context_tokens": "3",
        "token_budget": "4",
    }
    assert "2 micro-batches, whose gradients" in caught.value.message
    with pytest.raises(OutOfMemory, match="Shorten the sample of 4 continuation and 4 context"):
        take_step(model, optimizer, [ONE])


def test_the_activations_of_the_failed_step_are_free_while_its_error_lives(
    make_model: Make,
) -> None:
    model, activations = make_model("qwen3"), []
    optimizer = Apollo(model.named_parameters(), rank=8)
    model.model.norm.register_forward_hook(
        lambda module, inputs, output: activations.append(weakref.ref(output))
    )
    in_the_backward(model, no_memory_on_the_device)
    with pytest.raises(OutOfMemory):
        take_step(model, optimizer, [ONE])
    assert activations and all(ref() is None for ref in activations)


def test_another_mistake_is_not_taken_for_a_lack_of_memory(make_model: Make) -> None:
    model = make_model("qwen3")
    optimizer = Apollo(model.named_parameters(), rank=8)

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    in_the_forward(model, fail)
    with pytest.raises(RuntimeError, match="shapes"):
        take_step(model, optimizer, [ONE])
    with pytest.raises(RuntimeError, match="shapes"):
        evaluate(model, [ONE])


def test_an_evaluation_tells_it_too(make_model: Make) -> None:
    model = make_model("qwen3")
    evaluate(model, [ONE, OTHER])
    in_the_forward(model, ask_the_allocator)
    with pytest.raises(OutOfMemory):
        evaluate(model, [ONE, OTHER])


class Passes:
    """Graphs that hold memory, which a step needs that runs as it is."""

    def __init__(self, graphs: int):
        self.graphs, self.asked = graphs, 0

    def take(self, *_: Any, **__: Any) -> None:
        self.asked += 1

    def let_go(self) -> bool:
        held, self.graphs = bool(self.graphs), 0
        return held


def test_graphs_give_up_their_memory_before_a_step_is_refused(make_model: Make) -> None:
    model, passes = make_model("qwen3"), Passes(2)
    optimizer = Apollo(model.named_parameters(), rank=8)

    def fail_while_they_hold_it(*_: Any) -> None:
        if passes.graphs:
            no_memory_on_the_device()

    in_the_forward(model, fail_while_they_hold_it)
    for _ in range(2):
        take_step(model, optimizer, [ONE], passes=passes)  # type: ignore[arg-type]
    assert (optimizer.step_count, passes.graphs, passes.asked) == (2, 0, 2)
    in_the_forward(model, no_memory_on_the_device)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(OutOfMemory):
        take_step(model, optimizer, [ONE], passes=passes)  # type: ignore[arg-type]
    assert all(map(torch.equal, before, model.parameters()))


def test_what_a_step_needs_and_what_is_free_are_told_where_they_are_known(make_model: Make) -> None:
    model = make_model("qwen3")
    in_the_forward(model, ask_the_allocator)
    with pytest.raises(OutOfMemory) as caught:
        take_step(model, Apollo(model.named_parameters(), rank=8), [ONE])
    error = caught.value.with_needs(7_800_000_000, 5_200_000_000)
    assert error.message.startswith(caught.value.message)
    assert error.message.endswith("It needs 7.8 GB of the device, and 5.2 GB are free.")
    numbers = {"needed_bytes": "7800000000", "free_bytes": "5200000000"}
    assert error.metadata == caught.value.metadata | numbers
    assert error.reason == "OUT_OF_MEMORY"
