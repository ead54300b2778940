"""Run as a script: ties itself to its parent's life and to cores, then becomes another program.

`launch.py PARENT CORES PROGRAM [ARGUMENT...]`; CORES as `0,1`, or empty for all. Both settings
outlive the exec. Code of ours between fork and exec instead would run with grpc's locks in
whatever state its threads left them, and has crashed there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launch(parent: int, cores: str, program: list[str]) -> None:
    """Does not return: the process is `program` then, or has ended because its parent had."""
    # Without it a `kill -9` of the parent would leave this process behind.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
    if cores:
        # A container may forbid it, or have other cores by now: then all are shared.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    os.execvp(program[0], program)


if __name__ == "__main__":
    launch(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
