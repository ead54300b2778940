"""Whether a process runs, as the kernel tells it."""

from __future__ import annotations

import os
from pathlib import Path

# Stopped by a signal or a debugger, dead and not yet collected (proc(5), /proc/pid/stat).
_AT_REST = frozenset("TtZXx")


def namespace() -> int:
    """Inode of the PID namespace of this process: pids of another one name other processes."""
    return Path("/proc/self/ns/pid").stat().st_ino


def own() -> tuple[int, int]:
    """The pid of this process, and the namespace that it counts in."""
    return os.getpid(), namespace()


def runs(pid: int) -> bool:
    """False for a process that has ended, or that is stopped and computes nothing."""
    found = _state_and_parent(pid)
    return found is not None and found[0] not in _AT_REST


def runs_with_parent(pid: int) -> bool:
    """Whether a process and its parent run: vLLM's worker may be a child of its engine core."""
    found = _state_and_parent(pid)
    return found is not None and found[0] not in _AT_REST and (found[1] == 0 or runs(found[1]))


def _state_and_parent(pid: int) -> tuple[str, int] | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name before them, in brackets, may hold any character.
    state, parent = stat.rpartition(")")[2].split()[:2]
    return state, int(parent)
