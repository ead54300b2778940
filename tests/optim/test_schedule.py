"""The learning rate of each step of a run: warm-up, then a schedule until the run's last step."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.options import NO_SCHEDULE, settings_for
from apollo_trainer.training.options import OptimizerOptions


def optimizer() -> Apollo:
    return Apollo([("w", torch.nn.Parameter(torch.ones(8, 8)))], rank=4)


def rates(options: OptimizerOptions, total: int, *, taken: int = 0, steps: int = 0) -> list[float]:
    """The lr of each step of a run that begins after so many others."""
    made = optimizer()
    made.step_count = taken
    options.apply(made, total)
    numbers = range(taken + 1, taken + 1 + (steps or total))
    return [settings_for(made.param_groups[0], n, "channel", None).lr for n in numbers]


TRANSFORMERS: dict[str, Callable[..., Any]] = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
}


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_after_the_warm_up_it_is_transformers_schedule(name: Any, warmup: int) -> None:
    options = OptimizerOptions(lr=0.5, schedule=name, warmup_steps=warmup)
    plain = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    schedule, expected = TRANSFORMERS[name](plain, warmup, 12), []
    for _ in range(12):
        expected.append(plain.param_groups[0]["lr"])
        plain.step()
        schedule.step()
    found = rates(options, 12, taken=40)
    assert found[warmup:] == pytest.approx(expected[warmup:])
    # Theirs begins with nothing, ours ends with all.
    assert found[:warmup] == pytest.approx([0.5 * (n + 1) / 3 for n in range(warmup)])


def test_it_goes_down_to_the_final_fraction_and_stays_there() -> None:
    options = OptimizerOptions(lr=1.0, schedule="linear", final_lr_fraction=0.2, warmup_steps=1)
    assert rates(options, 5, steps=8) == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    options = OptimizerOptions(lr=1.0, schedule="cosine", final_lr_fraction=0.5)
    assert rates(options, 2, steps=3) == pytest.approx([1.0, 0.75, 0.5])


@pytest.mark.parametrize(("schedule", "total"), [("constant", 9), ("cosine", 0)])
def test_without_a_schedule_or_an_end_it_stays(schedule: Any, total: int) -> None:
    options = OptimizerOptions(lr=0.5, schedule=schedule, warmup_steps=2)
    assert rates(options, total, steps=6) == [0.25, 0.5, 0.5, 0.5, 0.5, 0.5]


@given(
    st.sampled_from(["linear", "cosine"]), st.integers(0, 30), st.integers(1, 30), st.floats(0, 1)
)
def test_it_never_rises_after_the_warm_up_nor_leaves_its_bounds(
    schedule: Any, warmup: int, total: int, final: float
) -> None:
    options = OptimizerOptions(
        lr=1.0, schedule=schedule, warmup_steps=warmup, final_lr_fraction=final
    )
    after = rates(options, total, steps=40)[warmup:]
    assert after == sorted(after, reverse=True)
    assert all(final - 1e-12 <= rate <= 1.0 for rate in after)


def test_a_run_without_one_ends_that_of_the_run_before() -> None:
    made = optimizer()
    OptimizerOptions(schedule="linear", final_lr_fraction=0.5).apply(made, 9)
    OptimizerOptions().apply(made, 9)
    assert NO_SCHEDULE.items() - {("steps_total", 0)} <= made.param_groups[0].items()


def test_a_schedule_is_in_the_state() -> None:
    made, again = optimizer(), optimizer()
    OptimizerOptions(lr=0.5, schedule="cosine", final_lr_fraction=0.5).apply(made, 9)
    tensors, meta = made.named_state()
    again.load_named_state(tensors, json.loads(json.dumps(meta)))
    for name in NO_SCHEDULE:
        assert again.param_groups[0][name] == made.param_groups[0][name]


def test_a_state_that_knows_no_schedule_has_none() -> None:
    made, again = optimizer(), optimizer()
    tensors, meta = made.named_state()
    for group in meta["param_groups"]:
        for name in NO_SCHEDULE:
            del group[name]
    OptimizerOptions(schedule="linear", final_lr_fraction=0.5).apply(again, 9)
    again.load_named_state(tensors, meta)
    assert NO_SCHEDULE.items() <= again.param_groups[0].items()


@pytest.mark.parametrize(
    ("option", "value"),
    [("schedule", "step"), ("final_lr_fraction", -0.1), ("final_lr_fraction", 1.1),
     ("steps_total", -1), ("steps_total", 2.5)],
)  # fmt: skip
def test_a_bad_one_is_named(option: str, value: object) -> None:
    made = optimizer()
    made.param_groups[0][option] = value
    with pytest.raises(ValueError, match=f"^{option} is "):
        made.step()
