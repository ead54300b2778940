"""Whether a process runs, as the kernel tells it."""

from __future__ import annotations

from pathlib import Path

# Stopped by a signal or a debugger, dead and not yet collected (proc(5), /proc/pid/stat).
_AT_REST = frozenset("TtZXx")


def runs(pid: int) -> bool:
    """False for a process that has ended, or that is stopped and computes nothing."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    # The name before it, in brackets, may hold any character.
    return stat.rpartition(")")[2].split()[0] not in _AT_REST
