"""The trainer's other ranks: processes that the server starts, tells what to do, and watches.

What they are told is JSON, a line each, on their standard input; at its end they end.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from apollo_grpc.errors import Unavailable
from apollo_trainer.parallel.ranks import Ranks

log = logging.getLogger(__name__)
MODULE = "apollo_trainer.follow"
READY = "ready"
# No step takes as long; a rank that has ended is noticed at once.
LONGEST = timedelta(minutes=30)
# The ranks speak on this host alone. Whether one has ended is for its process to tell: torch would
# end this one for it (docs.pytorch.org, "ProcessGroupNCCL Environment Variables").
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
END_SECONDS = 5.0
GIVE_UP_SECONDS = 0.5


def join(meet: Path, rank: int, size: int, device: int | None) -> dist.ProcessGroup:
    """Joins the other ranks over a file, on this host alone.

    Args:
        device: the GPU that this rank computes on, whose tensors NCCL adds; None for a CPU. What
            ranks agree on lies on the CPU, and is gloo's.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if device is not None:
        torch.cuda.set_device(device)
    backend = "gloo" if device is None else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, init_method=f"file://{meet}", rank=rank, world_size=size, timeout=LONGEST
    )
    group = dist.group.WORLD
    assert group is not None
    return group


class Followers:
    """Ranks 1 and up of one attachment.

    Args:
        size: of all ranks, this process, which is rank 0, included.
        folder: of the server's state; the ranks meet by a file in it.
        begin: what each is told first.
        ended: called with a sentence once one has ended by itself. Any thread.
        device: the GPU of this process; None for a CPU. The others find theirs by themselves.

    Raises Unavailable where one does not start.
    """

    def __init__(
        self,
        size: int,
        folder: Path,
        begin: dict[str, Any],
        ended: Callable[[str], None],
        device: int | None,
    ):
        self._on_gpus = device is not None
        self._meet = folder / f"ranks-{uuid.uuid4().hex}"
        self._ending, self._ended = threading.Event(), ended
        self._telling, self._telling_end = threading.Lock(), threading.Lock()
        self._told_end = False
        command = [sys.executable, "-m", MODULE]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(1, size)
        ]
        try:
            for rank, process in enumerate(self._processes, 1):
                self._write(process, {"rank": rank, "size": size, "meet": str(self._meet), **begin})
            for rank, process in enumerate(self._processes, 1):
                assert process.stdout
                if process.stdout.readline().strip() != READY:
                    raise _not_started(rank)
                threading.Thread(target=self._watch, args=[rank, process], daemon=True).start()
            self.ranks = Ranks(join(self._meet, 0, size, device), give_up=self._give_up)
        except (OSError, RuntimeError) as error:
            self.end()
            raise _not_started(0) from error
        except Unavailable:
            self.end()
            raise

    def listen(self) -> None:
        """From now on, what this rank does with all is told to the others."""
        self.ranks.tell = self._tell

    def _tell(self, do: str, **how: Any) -> None:
        with self._telling:
            for process in self._processes:
                self._write(process, {"do": do, **how})

    def _write(self, process: subprocess.Popen[str], told: dict[str, Any]) -> None:
        assert process.stdin
        try:
            process.stdin.write(json.dumps(told) + "\n")
            process.stdin.flush()
        except OSError:
            # Its end is told by whoever watches it; the next sum with it fails.
            log.debug("a trainer rank takes no more")

    def _watch(self, rank: int, process: subprocess.Popen[str]) -> None:
        status = process.wait()
        if not self._ending.is_set():
            self._abort()
        self._tell_end(f"Trainer rank {rank} ended ({_told(status)}); its log has why.")

    def _abort(self) -> None:
        """Ends a sum on a GPU, which would wait for a rank that has ended as for a slow one."""
        if self._on_gpus and dist.is_initialized():
            group = dist.group.WORLD
            assert group is not None
            group._get_backend(torch.device("cuda")).abort()

    def _tell_end(self, why: str) -> None:
        """The first cause alone: what follows from it ends the others."""
        with self._telling_end:
            if not self._ending.is_set() and not self._told_end:
                self._told_end = True
                self._ended(why)

    def _give_up(self) -> None:
        """One rank broke off alone: what the others wait for will never come."""
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                # It may have ended just now, and be the cause.
                process.wait(GIVE_UP_SECONDS / len(self._processes))
        self._tell_end("The trainer's ranks no longer go on together; the server's log has why.")
        self.end()

    def end(self) -> None:
        """Ends them all, and forgets the group. Idempotent; any thread."""
        if self._ending.is_set():
            return
        self._ending.set()
        for process in self._processes:
            assert process.stdin
            process.kill()
        for process in self._processes:
            process.wait(END_SECONDS)
        self._abort()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._meet.unlink(missing_ok=True)


def _told(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


def _not_started(rank: int) -> Unavailable:
    which = f"Trainer rank {rank}" if rank else "A trainer rank"
    return Unavailable(
        f"{which} did not start; the server's log has why. Nothing was written.",
        reason="ENGINE_NOT_ATTACHED",
    )
