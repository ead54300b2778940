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
from contextlib import contextmanager, suppress
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
_PIPE, _LOG = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
# CUDA's driver alone, which needs no second: whether a context can be had (CUDA Driver API).
_CLIENT = """
import ctypes, sys
driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
sys.exit(bool(driver.cuInit(0) or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)))
"""


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
    """Runs an MPS daemon within it; by turns needs nothing.

    AUTO is by MPS, and by turns where there is none or it takes no client, which a note says. A
    daemon that the environment names is used as it is.

    Args:
        folder: the daemon's folders are made in it, for this user alone.

    Raises FailedPrecondition where MPS was asked for, and there is none here, or its daemon does
    not start or takes no client.
    """
    if asked is GpuSharing.TIME or (asked is GpuSharing.AUTO and engine_on_cpu()):
        yield Shared()
        return
    if asked is GpuSharing.AUTO and _PIPE in os.environ:
        yield _by_mps({}, f"GPU shared by the MPS daemon of {os.environ[_PIPE]}")
        return
    try:
        daemon, places = _start(folder)
    except FailedPrecondition as error:
        if asked is GpuSharing.MPS:
            said = f"{error.message} Nothing was started."
            raise FailedPrecondition(said, reason=error.reason) from error
        yield Shared(notes=(f"GPU shared by turns. {error.message}",))
        return
    try:
        yield _by_mps(places, "GPU shared by MPS")
    finally:
        _stop(daemon, places)


def _by_mps(places: dict[str, str], note: str) -> Shared:
    behind = {"CUDA_MPS_CLIENT_PRIORITY": BELOW_NORMAL}
    note += ": training goes behind vLLM"
    return Shared(places, behind, (note,), lambda process: _terminate(process, places))


def _folders(folder: Path) -> dict[str, str]:
    """One pair a process: a daemon that ended badly may leave its own unusable."""
    own = private_folder(folder / f"mps-{os.getpid()}")
    return {_PIPE: str(private_folder(own / "pipe")), _LOG: str(private_folder(own / "log"))}


def _start(folder: Path) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
    """Returns once it has taken a client. It ends with this process, whatever ends that."""
    if engine_on_cpu() or shutil.which(CONTROL) is None:
        raise FailedPrecondition(
            f"MPS needs an NVIDIA GPU and {CONTROL}, which comes with its driver; "
            "--gpu-sharing time needs neither.",
            reason="MPS_NOT_FOUND",
        )
    places = _folders(folder)
    daemon = subprocess.Popen(
        [sys.executable, launch.__file__, str(os.getpid()), "", CONTROL, "-f"],
        env=_environment(places),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    if not _serves(daemon, places) or not _takes_a_client(places):
        _stop(daemon, places)
        raise FailedPrecondition(
            f"The MPS daemon did not start; its log is in {places[_LOG]}. "
            "--gpu-sharing time does without it.",
            reason="MPS_NOT_STARTED",
        )
    return daemon, places


def _environment(places: dict[str, str]) -> dict[str, str]:
    """A daemon that sees some GPUs counts them anew, and its clients then by its count."""
    return {name: value for name, value in os.environ.items() if name != _VISIBLE} | places


def _serves(daemon: subprocess.Popen[bytes], places: dict[str, str]) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while not (Path(places[_PIPE]) / "control").exists():
        if daemon.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _takes_a_client(places: dict[str, str]) -> bool:
    """Tried before anything else would fail by it, as in containers that keep both apart."""
    command = [sys.executable, "-c", _CLIENT]
    with suppress(subprocess.TimeoutExpired):
        ran = subprocess.run(
            command, env=os.environ | places, capture_output=True, timeout=START_SECONDS
        )
        return ran.returncode == 0
    return False


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
