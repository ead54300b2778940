"""What the kernels of several ranks add up between their launches, in place.

Of a matrix whose smaller side is divided each rank has a part of every projection and of every
channel's square; of one whose larger side is, it has some of the channels. Waves are alike on all
ranks, so that each sum is one message for all matrices of a wave.
"""

from __future__ import annotations

from torch import Tensor

from apollo_trainer.optim.cuda import kinds, scale
from apollo_trainer.optim.cuda.scratch import Step
from apollo_trainer.optim.cuda.tables import Wave
from apollo_trainer.parallel.ranks import Ranks


def add_projections(wave: Wave, step: Step, ranks: Ranks) -> None:
    """Between a wave's projections and its moments, which are of all ranks' gradients then."""
    kind, (flags, _, _) = wave.kind, step.of(wave)
    if kind.sums_channels:
        ranks.largest(flags)
    if not kind.sums_projections:
        return
    R, squares = step.R[: wave.sizes.r], step.squares[: wave.sizes.channels]
    for first, size, channel, count in wave.projections_elsewhere:
        R[first : first + size].zero_()
        squares[channel : channel + count].zero_()
    ranks.sum(R)
    ranks.sum(squares)
    flags.zero_()
    scale.flag[(len(wave.tiles["moments"]),)](
        wave.desc, wave.tiles["moments"], squares, flags, ROW_CHANNELS=kind.row_channels,
        BLOCK_N=kinds.BLOCK_MOMENTS,
    )  # fmt: skip


def add_parts(wave: Wave, step: Step, ranks: Ranks) -> Tensor:
    """What the limiter needs of all channels: float32, three numbers a matrix."""
    totals = step.totals[: 3 * len(wave.matrices)]
    scale.add_parts[(len(wave.matrices),)](wave.desc, step.parts, totals, BLOCK=256)
    for n, matrix in enumerate(wave.matrices):
        if not matrix.slot.region.counted:
            totals[3 * n : 3 * n + 3].zero_()
    ranks.sum(totals)
    return totals
