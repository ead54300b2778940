"""How much memory is free for new processes: of the machine, or of its container."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MACHINE, LIMITED = "on this machine", "below this container's limit (cgroup)"


@dataclass(frozen=True)
class FreeMemory:
    """Bytes, and where."""

    bytes: int
    where: str


def free_memory(root: Path = Path("/")) -> FreeMemory:
    """The least of what the machine and each memory limit around this process leave.

    Args:
        root: where /proc and /sys are.
    """
    of_machine = FreeMemory(_meminfo(root)["MemAvailable"], MACHINE)
    limited = (FreeMemory(free, LIMITED) for free in _below_limits(root))
    return min([of_machine, *limited], key=lambda found: found.bytes)


def _meminfo(root: Path) -> dict[str, int]:
    rows = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, *_ in rows}


def _below_limits(root: Path) -> Iterator[int]:
    """What each cgroup from this process's up to the root leaves, of version 1 and 2."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        folder = base / path.lstrip("/")
        # In a container the path may be the host's, and its own group the topmost one here.
        for group in (folder, *folder.parents):
            if (free := _left(group)) is not None:
                yield free
            if group == base:
                break


def _left(group: Path) -> int | None:
    """What may still be taken in a cgroup, dropped file pages included; None without a limit."""
    names = (("memory.max", "memory.current", "inactive_file"),
             ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))  # fmt: skip
    for limit, usage, reclaimable in names:
        try:
            most, used = (int((group / name).read_text()) for name in (limit, usage))
            stat = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # Of the other version, or `max`.
        return most - used + int(stat.get(reclaimable, 0))
    return None
