"""Which cores the engine and the training server get when both compute on the CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Cores:
    """Two parts of this machine's cores; the trainer's are the engine's too where these are few."""

    engine: tuple[int, ...]
    trainer: tuple[int, ...]

    def bound(self, workers: int) -> str:
        """The cores of each of vLLM's workers, as VLLM_CPU_OMP_THREADS_BIND takes them."""
        parts = (self.engine[worker::workers] for worker in range(workers))
        return "|".join(",".join(map(str, part or self.engine[:1])) for part in parts)


def engine_on_cpu() -> bool:
    """Whether the vLLM that is installed computes on the CPU: a build of its own does."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        try:
            return "cpu" in version("vllm")
        except PackageNotFoundError:
            return False
    return True


def split_cores(workers: int = 1) -> Cores | None:
    """Half of the cores each, but one at least for each of vLLM's workers.

    None on a GPU engine, or where there is one core only.

    Both would otherwise start a thread on every core, and threads that spin while they wait
    starve the other side.
    """
    if not engine_on_cpu():
        return None
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    engine = cores[: max(len(cores) - half, workers)]
    return Cores(tuple(engine), tuple(cores[-half:])) if half else None
