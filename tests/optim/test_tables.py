"""The tables of a fused step: after whatever fails they tell of the next step's gradients."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.cuda import FusedStepper, Work
from apollo_trainer.optim.factored import Factored

SHAPES = {"tall": (48, 16), "wide": (16, 40), "experts": (3, 16, 12), "bias": (21,), "norm": (5,)}


class Failing(TorchDispatchMode):
    """Makes the nth operation fail; None of them where there are fewer."""

    def __init__(self, nth: int):
        super().__init__()
        self._left = nth

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("not enough memory")
        return func(*args, **(kwargs or {}))


class Tried:
    """An optimizer whose kernels are prepared, and not launched, on a CPU."""

    def __init__(self) -> None:
        params = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]
        self._optimizer = Apollo(params, rank=8)
        self.stepper = FusedStepper(torch.device("cpu"), mini=False)

    def prepare(self, gradients: dict[str, Tensor | Factored], new: bool = False) -> list[Tensor]:
        """What each wave's kernels are told; by a stepper without a past, if asked."""
        optimizer = self._optimizer
        works = [Work(s, gradients[s.name], optimizer.state[s.param]) for s in optimizer._slots]
        stepper = FusedStepper(torch.device("cpu"), mini=False) if new else self.stepper
        prepared = stepper.prepare(works, optimizer._settings(), "nearest", measure=True)
        return [wave.desc for wave in prepared.waves if wave.desc is not None]


def gradients(tokens: int) -> dict[str, Tensor | Factored]:
    made: dict[str, Tensor | Factored] = {n: torch.zeros(shape) for n, shape in SHAPES.items()}
    made["tall"] = Factored(torch.zeros(tokens, 48), torch.zeros(tokens, 16))
    return made


def test_whichever_operation_fails_the_next_step_is_told_of_its_own_gradients() -> None:
    # Held, so that no two lie at one address.
    held = [gradients(tokens) for tokens in (32, 48)]
    for nth in itertools.count(1):
        tried = Tried()
        tried.prepare(held[0])
        try:
            with Failing(nth):
                tried.prepare(held[1])
        except RuntimeError:
            for again in (held[1], held[0]):
                told, expected = tried.prepare(again), tried.prepare(again, new=True)
                assert len(told) == len(expected) == 4
                assert all(map(torch.equal, told, expected)), f"operation {nth}"
            continue
        break
    assert nth > 10
