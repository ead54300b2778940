"""The memory of a fused step: what kernels are given of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apollo_grpc.region import Region
from apollo_trainer.optim.cuda import scratch
from apollo_trainer.optim.cuda.kinds import Kind
from apollo_trainer.optim.cuda.rows import Matrix
from apollo_trainer.optim.cuda.tables import Wave
from apollo_trainer.optim.parameters import Slot

ADAM = Kind(torch.bfloat16, torch.bfloat16, None)
BIAS = Slot("bias", torch.zeros(3), 1, 0, None, Region.whole_of((3,)))


def waves_of(*counts: int) -> list[Wave]:
    """Waves of so many vectors each."""
    waves, first = [], 0
    for count in counts:
        matrices = [Matrix(BIAS, {}, 0, n, 1, 3) for n in range(count)]
        waves.append(Wave(ADAM, first, matrices, tiles={"elements": torch.zeros(3 * count, 2)}))
        first += count
    return waves


@pytest.mark.parametrize("counts", [(1,), (1, 1, 1), (3, 2, 5), (36, 145, 7)])
def test_all_that_kernels_are_given_begins_where_those_compiled_ahead_expect_it(
    counts: tuple[int, ...],
) -> None:
    """Triton compiles a kernel once more, amid a step, where a pointer is no multiple of 16."""
    waves = waves_of(*counts)
    step = scratch.set_aside(waves, 5, "stochastic", True, torch.device("cpu"))
    given: list[Tensor] = [step.slot_flags, step.sums[-1]]
    given += [part for wave in waves for part in (*step.of(wave), step.changes_of(wave))]
    assert [part.data_ptr() % 16 for part in given] == [0] * len(given)


def test_no_wave_is_given_what_is_anothers() -> None:
    waves = waves_of(3, 2, 5)
    step = scratch.set_aside(waves, 5, "stochastic", True, torch.device("cpu"))
    for number, wave in enumerate(waves, 1):
        flags, *_ = step.of(wave)
        assert len(flags) == 2 * len(wave.matrices)
        assert not flags.any()
        flags.fill_(number)
    assert not step.slot_flags.any()
    assert all((step.of(wave)[0] == n).all() for n, wave in enumerate(waves, 1))
