"""What a step needs of the device, in words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from apollo_trainer.training.memory import StepMemory
from apollo_trainer.training.samples import TokenizedSample

_USUAL = 1024  # tokens of a usual sample
# What a twin raises where the shapes in a model's passes depend on values.
CANNOT = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True)
class StepShape:
    """Samples of a step, all of one length.

    Attributes:
        context: tokens of each, the last of which runs with the continuation.
        continuation: tokens that each learns.
    """

    context: int
    continuation: int
    samples: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of '1800+200', or '32x64+64' for 32 samples. Raises ValueError on anything else."""
        found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(\d+)\s*\+\s*(\d+)", text.strip())
        samples, context, continuation = (
            (int(n or 1) for n in found.groups()) if found else (0,) * 3
        )
        if not (samples and context and continuation):
            raise ValueError(f"{text!r} is no length of a step, such as 1800+200 or 32x64+64.")
        return cls(context, continuation, samples)

    def __str__(self) -> str:
        many = f"{self.samples} samples of " if self.samples > 1 else ""
        return f"{many}{self.context} + {self.continuation}"

    def of_samples(self) -> list[TokenizedSample]:
        """Samples of this shape, no two of one context."""
        return [
            TokenizedSample((number,) * self.context, (0,) * self.continuation)
            for number in range(self.samples)
        ]


def lengths_of(longest: int) -> list[StepShape]:
    """A usual step and the longest one, for samples of at most so many tokens.

    Of the usual one a fourth is learned, of the longest an eighth.
    """
    usual = min(_USUAL, longest)
    parts = {usual: max(1, usual // 4)}
    if longest > usual:
        parts[longest] = longest // 8
    return [StepShape(tokens - learned, learned) for tokens, learned in parts.items()]


def told(memory: StepMemory, longest: int, free: int) -> list[str]:
    """What steps of these lengths need and what is free, in sentences.

    Raises one of `CANNOT` where it cannot be known.

    Args:
        longest: tokens of a sample.
        free: bytes of the device.
    """
    steps = [
        f"A step of {shape} tokens needs {gigabytes(memory.step_bytes(shape.of_samples()))} of "
        "the device."
        for shape in lengths_of(longest)
    ]
    return [*steps, f"{gigabytes(free)} are free."]


def gigabytes(count: int) -> str:
    """Bytes in GB of 10^9, for people."""
    return f"{count / 1e9:.1f} GB"
