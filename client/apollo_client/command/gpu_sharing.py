"""How vLLM and the training server share one GPU: by turns, or side by side under NVIDIA's MPS.

MPS needs no root and changes no setting of the card: a control daemon with folders of its own,
started before both programs (NVIDIA, "Multi-Process Service", CUDA_MPS_PIPE_DIRECTORY).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from apollo_client.command import launch
from apollo_client.command.cores import engine_on_cpu
from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.locations import private_folder

CONTROL = "nvidia-cuda-mps-control"
# Of a client's priority: the other one's blocks go first, where both wait for room.
BELOW_NORMAL = "1"
START_SECONDS = STOP_SECONDS = 10.0
_POLL_SECONDS = 0.05


class GpuSharing(StrEnum):
    """What a user may ask for."""

    AUTO = "auto"
    MPS = "mps"
    TIME = "time"


@dataclass(frozen=True)
class Shared:
    """How both programs are to start.

    Attributes:
        both: environment variables of both.
        trainer: others of the training server alone.
        notes: what is said of it.
        before_kill: takes the process of a program that has to be killed off the GPU.
    """

    both: dict[str, str] = field(default_factory=dict)
    trainer: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    before_kill: Callable[[int], None] = lambda process: None


@contextmanager
def shared_gpu(asked: GpuSharing, folder: Path) -> Iterator[Shared]:
    """Runs an MPS daemon within it where that was asked for; by turns needs nothing.

    AUTO is by turns: what a kill of one program does to the other under MPS is not measured yet.

    Args:
        folder: the daemon's folders are made in it, for this user alone.

    Raises FailedPrecondition where there is no MPS here, or its daemon does not start.
    """
    if asked is not GpuSharing.MPS:
        yield Shared()
        return
    if engine_on_cpu() or shutil.which(CONTROL) is None:
        raise FailedPrecondition(
            f"--gpu-sharing mps needs an NVIDIA GPU and {CONTROL}, which comes with its driver. "
            "Nothing was started. --gpu-sharing time needs neither.",
            reason="MPS_NOT_FOUND",
        )
    places = _folders(folder)
    daemon = _start(places)
    try:
        yield Shared(
            places,
            {"CUDA_MPS_CLIENT_PRIORITY": BELOW_NORMAL},
            ("GPU shared by MPS: training goes behind vLLM",),
            lambda process: _terminate(process, places),
        )
    finally:
        _stop(daemon, places)


def _folders(folder: Path) -> dict[str, str]:
    """One pair a process: a daemon that ended badly may leave its own unusable."""
    own = private_folder(folder / f"mps-{os.getpid()}")
    return {
        "CUDA_MPS_PIPE_DIRECTORY": str(private_folder(own / "pipe")),
        "CUDA_MPS_LOG_DIRECTORY": str(private_folder(own / "log")),
    }


def _start(places: dict[str, str]) -> subprocess.Popen[bytes]:
    """Returns once it takes clients. It ends with this process, whatever ends that."""
    command = [sys.executable, launch.__file__, str(os.getpid()), "", CONTROL, "-f"]
    daemon = subprocess.Popen(
        command,
        env=os.environ | places,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + START_SECONDS
    while not (Path(places["CUDA_MPS_PIPE_DIRECTORY"]) / "control").exists():
        if daemon.poll() is not None or time.monotonic() > deadline:
            _stop(daemon, places)
            raise FailedPrecondition(
                f"The MPS daemon did not start; its log is in {places['CUDA_MPS_LOG_DIRECTORY']}. "
                "Nothing else was started. --gpu-sharing time does without it.",
                reason="MPS_NOT_STARTED",
            )
        time.sleep(_POLL_SECONDS)
    return daemon


def _terminate(process: int, places: dict[str, str]) -> None:
    """Has the daemon stop a client's work: killed amid it, it could harm the other client.

    NVIDIA, "Multi-Process Service", terminate_client.
    """
    for server in _ask(places, "get_server_list").split():
        _ask(places, f"terminate_client {server} {process}")


def _ask(places: dict[str, str], command: str) -> str:
    """The daemon's answer; empty where there is none in time."""
    try:
        asked = subprocess.run(
            [CONTROL],
            input=f"{command}\n".encode(),
            env=os.environ | places,
            capture_output=True,
            timeout=STOP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ""
    return asked.stdout.decode(errors="replace")


def _stop(daemon: subprocess.Popen[bytes], places: dict[str, str]) -> None:
    """Asks it to quit, which it does without clients; then ends what is left of it."""
    if daemon.poll() is None:
        _ask(places, "quit")
        try:
            daemon.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
