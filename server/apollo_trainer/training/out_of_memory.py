"""A step that ran out of memory: not begun, and told with what to lower."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from apollo_grpc.errors import ResourceExhausted
from apollo_trainer.training.batch import MicroBatch

# torch's allocator on a CPU raises a plain RuntimeError, with one of these words in it.
_WORDS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "Cannot allocate memory")

_A_FEW_TOKENS = (
    "There is not even memory for a forward of a few tokens; nothing was written. Lower vLLM's "
    "gpu_memory_utilization, or give the server more memory."
)


class OutOfMemory(ResourceExhausted):
    """A step needs more memory than there is; the weights and the optimizer are as before it."""

    default_reason = "OUT_OF_MEMORY"

    def with_needs(self, needed: int, free: int) -> OutOfMemory:
        """The same, with what the step needs of the device and what is free there, in bytes."""
        return OutOfMemory(
            f"{self.message} It needs {needed / 1e9:.1f} GB of the device, and {free / 1e9:.1f} GB "
            "are free.",
            metadata={**self.metadata, "needed_bytes": str(needed), "free_bytes": str(free)},
        )


@contextmanager
def refusing_out_of_memory(
    batches: Sequence[MicroBatch] = (), token_budget: int = 0
) -> Iterator[None]:
    """Turns a failed allocation inside into OutOfMemory; wrap nothing that has written.

    Args:
        batches: the micro-batches that run inside; none where only a few tokens are tried.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # Frames of the failed step hold its activations for as long as the error lives.
        traceback.clear_frames(error.__traceback__)
    else:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise _refusal(batches, token_budget) if batches else OutOfMemory(_A_FEW_TOKENS)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, of torch on any device or of Python."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def _refusal(batches: Sequence[MicroBatch], token_budget: int) -> OutOfMemory:
    largest = max(batches, key=lambda b: (b.learned_tokens, len(b.samples) * b.context_width))
    rows, learned, context = len(largest.samples), largest.learned_width, largest.context_width
    todo = f"Shorten the sample of {learned} continuation and {context + 1} context tokens."
    if len(batches) > 1:
        todo += (
            f" The step has {len(batches)} micro-batches, whose gradients it holds until it is "
            "written: give a step fewer samples."
        )
    return OutOfMemory(
        f"The step ran out of memory; nothing of it was written. Its largest micro-batch has "
        f"{largest.learned_tokens} continuation tokens ({rows} samples of up to {learned}, padding "
        f"included) after {context} tokens of frozen context; the token budget is {token_budget}. "
        f"{todo}",
        metadata={
            "largest_micro_batch_tokens": str(largest.learned_tokens),
            "samples": str(rows),
            "context_tokens": str(context),
            "token_budget": str(token_budget),
        },
    )
