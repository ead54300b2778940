"""Two processes joined by gloo over a file, and what each of them returned.

On a GPU both compute on the same one, as NCCL's ranks may not: gloo adds up tensors of either.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from apollo_trainer.parallel.ranks import ALONE, Ranks

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ("cpu", pytest.param("cuda", marks=NO_GPU))


def on_two_ranks(work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(ranks, *args)` returned on each rank; tensors, and plain values around them."""
    with tempfile.TemporaryDirectory() as folder:
        # Both are forks of one process, that has imported everything once; it may have asked for
        # GPUs, and a fork of such a one can use none.
        how = "spawn" if "cuda" in args else "forkserver"
        get_context("forkserver").set_forkserver_preload([__name__, work.__module__])
        mp.start_processes(_run, (folder, work, args), nprocs=2, start_method=how)
        return [torch.load(Path(folder) / f"{r}.pt", map_location="cpu") for r in (0, 1)]


def on_one(work: Callable[..., Any], *args: Any) -> Any:
    """The same of this process alone."""
    file = io.BytesIO()
    torch.save(work(ALONE, *args), file)
    file.seek(0)
    return torch.load(file, map_location="cpu")


def _run(rank: int, folder: str, work: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    # Its own addresses: the host's name may lead nowhere.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(work(Ranks(dist.group.WORLD), *args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
