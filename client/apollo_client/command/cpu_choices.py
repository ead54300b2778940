"""What vLLM is told where it computes on the CPU and the user did not say it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apollo_client.command.cores import engine_on_cpu
from apollo_client.command.free_memory import free_memory
from apollo_client.command.model_files import weight_files
from apollo_client.command.vllm_options import told
from apollo_grpc.errors import ResourceExhausted

GIB = 2**30
KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"
_EAGER = "--enforce-eager"
_COMPILES = (_EAGER, "--no-enforce-eager", "-O", "--optimization-level", "-cc",
             "--compilation-config")  # fmt: skip
_SIZES_KV_CACHE = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
# vLLM fills it with zeros when it starts: some seconds for each GiB of a small machine.
MOST_GIB = 4
# Of vLLM's three processes and the training server without a model (2.2 GB with vLLM 0.32), and
# the updates that are kept for an undo.
PROCESSES_BYTES = 3 * GIB
# The live weights, their copy while they are synced, and a step's gradients and moments.
TIMES_WEIGHTS = 3


@dataclass(frozen=True)
class KVCache:
    """Room for vLLM's KV cache.

    Attributes:
        gib: whole ones.
        free: bytes that are free now, of which this is a part.
    """

    gib: int
    free: int


def eager(arguments: Sequence[str]) -> list[str]:
    """`--enforce-eager` on a CPU, unless the user spoke of compilation.

    Compiling takes longer there than all else of a start.
    """
    return [_EAGER] if engine_on_cpu() and not told(arguments, *_COMPILES) else []


def kv_cache(model: Path, arguments: Sequence[str]) -> KVCache | None:
    """What to give it; None where the user said it, and on a GPU.

    vLLM would take nine tenths of all memory: none would be left for training.

    Raises ResourceExhausted where not even the smallest one fits.
    """
    if not sizes_kv_cache(arguments):
        return None
    weights = sum(path.stat().st_size for path in weight_files(model))
    needed = TIMES_WEIGHTS * weights + PROCESSES_BYTES
    free = free_memory()
    if free.bytes < needed + GIB:
        raise ResourceExhausted(
            f"{model} needs about {(needed + GIB) / 1e9:.1f} GB of memory: its weights and their "
            f"training, two servers, and 1 GiB of KV cache. {free.bytes / 1e9:.1f} GB are free "
            f"{free.where}. Nothing was started. End what else takes memory, or try all the same "
            f"with {KV_CACHE}=1.",
            reason="MEMORY_TOO_LITTLE",
        )
    half = (free.bytes - needed) // (2 * GIB)
    return KVCache(max(1, min(half, MOST_GIB)), free.bytes)


def sizes_kv_cache(arguments: Sequence[str]) -> bool:
    """Whether it is for us to say how large vLLM's KV cache is."""
    said = os.environ.get(KV_CACHE) or told(arguments, *_SIZES_KV_CACHE)
    return engine_on_cpu() and not said
