"""Where bytes lie in the memory of processes, read as a debugger reads it (proc(5))."""

from __future__ import annotations

import os
from pathlib import Path

CHUNK_BYTES = 1 << 24
MEMFD = "/memfd:apollo-live-weights"


def process_group(leader: int) -> list[int]:
    """All processes that were started with `leader`, itself included."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == leader:
                found.append(int(entry.name))
        except ProcessLookupError:
            continue
    return found


def places(pid: int, needle: bytes) -> dict[str, int]:
    """How often `needle` lies in each mapping of a process, by the mapping's name."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        bounds, permissions, *_ = fields = line.split(maxsplit=5)
        name = fields[5] if len(fields) > 5 else "anonymous"
        if permissions.startswith("r") and not name.startswith(("[vvar", "[vsyscall", "/dev/")):
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            if count := _count(pid, start, end, needle):
                found[name] = found.get(name, 0) + count
    return found


def _count(pid: int, start: int, end: int, needle: bytes) -> int:
    """Occurrences within a mapping; what cannot be read, as beyond a file's end, holds none."""
    count, position = 0, start
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        while position < end:
            memory.seek(position)
            try:
                read = memory.read(min(CHUNK_BYTES + len(needle) - 1, end - position))
            except OSError:
                read = b""
            count += read.count(needle)
            position += CHUNK_BYTES
    return count
