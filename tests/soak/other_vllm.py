"""A vLLM that knows nothing of Apollo and loads the model directory again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.vllm.conftest import Stack
from tests.vllm.families import Family

IDS = list(range(60, 100))


class OtherVllm:
    """Without the plugin: it reads files, with vLLM's own loader, and is told of nothing.

    Args:
        stack: its vLLM serves an untied model: a tied head's packed weights stay the old ones
            when vLLM 0.32 loads anew on a CPU.
    """

    def __init__(self, stack: Stack):
        self._stack = stack

    def load(self) -> None:
        """Loads anew: `Worker.reload_weights` opens the directory by its name, as a start does."""
        self._stack.post("/collective_rpc", {"method": "reload_weights"})

    def require_same_as_transformers(self) -> torch.Tensor:
        """Log-probabilities of a prompt; asserts that transformers computes them from the files."""
        served = self._stack.engine_logprobs(IDS)
        logprobs = self._stack.directory_logits(IDS)[:-1]
        expected = logprobs.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
        apart = float((served - expected).abs().max())
        assert apart < self._stack.family.tolerance_nats, f"{apart} nats apart"
        return served


@contextmanager
def other_vllm(folder: Path, family: Family, model: Path) -> Iterator[OtherVllm]:
    """One that serves `model`, which it has loaded once."""
    stack = Stack(folder, "other", family, model)
    try:
        # A prefix computed with the weights of before would answer for those of now.
        stack.start_vllm("--no-enable-prefix-caching", plugins="", VLLM_SERVER_DEV_MODE="1")
        stack.wait_serving()
        yield OtherVllm(stack)
    finally:
        stack.end("vllm")
