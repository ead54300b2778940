"""`apollo-training-server memory DIRECTORY`: what training needs of a card, before anything runs.

Only shapes are computed with: neither the weights nor a GPU need be there.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from apollo_grpc.errors import ApolloError, InvalidArgument
from apollo_trainer.config import Settings, read_settings
from apollo_trainer.training.delta_rule import choose_delta_rule
from apollo_trainer.training.memory import StepMemory
from apollo_trainer.training.needs import CANNOT, StepShape, gigabytes
from apollo_trainer.training.options import StateShape
from apollo_trainer.training.twin import twin_of_directory

NAME = "memory"
# Of both processes beside all that is counted here: CUDA's own, and the graphs that vLLM captures
# beyond its share. 4.0 GB on an H200 with vLLM 0.26.
BESIDE_BYTES = 4_000_000_000
_USUAL = "1800+200"


@dataclass(frozen=True)
class Memory:
    """What a model's training needs of a card; bytes.

    Attributes:
        step: the length that `step_bytes` is of.
        weights_bytes: vLLM's, of its share.
        state_bytes: of the Apollo state.
        total_bytes: of the card; None where none was found or named.
        gpu_memory_utilization: the largest that vLLM may be started with; None likewise, 0 where
            no room is left for the weights.
    """

    step: str
    weights_bytes: int
    state_bytes: int
    step_bytes: int
    total_bytes: int | None
    gpu_memory_utilization: float | None

    def lines(self) -> list[str]:
        """A line a subject."""
        rows = [
            ("weights", f"{gigabytes(self.weights_bytes)}, of vLLM's share"),
            ("state", f"{gigabytes(self.state_bytes)} beside vLLM, from the attachment on"),
            ("step", f"{gigabytes(self.step_bytes)} beside vLLM, for {self.step} tokens"),
        ]
        if self.total_bytes is not None:
            share = f"{self.gpu_memory_utilization:.2f} of {gigabytes(self.total_bytes)} at most"
            none = f"{gigabytes(self.total_bytes)} are too little for weights, state and step"
            told = f"--gpu-memory-utilization {share}" if self.gpu_memory_utilization else none
            rows.append(("card", told))
        return [f"{name:<12} {value}" for name, value in rows]


def memory_of(directory: Path, shape: StepShape, total: int | None, settings: Settings) -> Memory:
    """Finds it out, in some seconds.

    Raises ApolloError where transformers has no such model, and one of `CANNOT` where its passes go
    by values.
    """
    state = StateShape(settings.rank, settings.variant, settings.rounding)
    twin = twin_of_directory(directory)
    choose_delta_rule(twin, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    memory = StepMemory(twin, state, settings.token_budget)
    step = memory.step_bytes(shape.of_samples())
    share = None
    if total is not None:
        share = _share(total - memory.state_bytes - step - BESIDE_BYTES, memory, total)
    return Memory(str(shape), memory.weights_bytes, memory.state_bytes, step, total, share)


def _share(left: int, memory: StepMemory, total: int) -> float:
    """Of vLLM, rounded down to a hundredth."""
    return max(0, 100 * left // total) / 100 if left > memory.weights_bytes else 0.0


def command(program: str, arguments: list[str]) -> int:
    """Prints what training needs; the exit status is 1 where it cannot be known."""
    asked = _parser(program).parse_args(arguments)
    total = _total() if asked.gpu_memory_gb is None else round(1e9 * asked.gpu_memory_gb)
    try:
        memory = memory_of(asked.directory, asked.step, total, read_settings([]))
    except InvalidArgument as error:
        print(f"{program}: {error.message}", file=sys.stderr)
        return 2
    except ApolloError as error:
        print(f"{program}: {error.message}", file=sys.stderr)
        return 1
    except CANNOT as error:
        print(f"{program}: it cannot be known for this model: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(memory)) if asked.json else "\n".join(memory.lines()))
    return 0


def _total() -> int | None:
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def _shape(text: str) -> StepShape:
    try:
        return StepShape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _gigabytes(text: str) -> float:
    found = float(text)
    if not 0 < found < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no size of a card")
    return found


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{program} {NAME}",
        description="Tell what a training step of a model needs of a GPU, and how much of it vLLM "
        "may take. Settings of the optimizer are the environment's, APOLLO_RANK and others.",
    )
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="of the model")
    parser.add_argument(
        "--step",
        type=_shape,
        default=StepShape.parse(_USUAL),
        help=f"CONTEXT+CONTINUATION tokens, or SAMPLESxCONTEXT+CONTINUATION; {_USUAL}",
    )
    parser.add_argument(
        "--gpu-memory-gb",
        type=_gigabytes,
        help="of the card, in 10^9 bytes; default: this machine's",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser
