"""What memory is free, by files as Linux writes them: on a machine, and in containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from apollo_client.command.free_memory import LIMITED, MACHINE, FreeMemory, free_memory

GIB = 2**30
MEMINFO = (
    "MemTotal: 25165824 kB\nMemFree: 1048576 kB\nMemAvailable: 20971520 kB\nHugePages_Total: 0\n"
)
UNLIMITED_1 = 9223372036854771712


def write(root: Path, cgroup: str, **groups: dict[str, object]) -> Path:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup}
    for group, values in groups.items():
        for name, value in values.items():
            files[f"sys/fs/cgroup/{group.replace('__', '/')}/{name}"] = f"{value}\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def second(limit: object, used: int, inactive: int = 0) -> dict[str, object]:
    stat = f"anon 1\ninactive_file {inactive}"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


def first(limit: int, used: int, inactive: int = 0) -> dict[str, object]:
    stat = f"cache 1\ntotal_inactive_file {inactive}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


def test_without_limits_it_is_what_linux_calls_available(tmp_path: Path) -> None:
    root = write(tmp_path, "0::/user\n", user=second("max", 3 * GIB))
    assert free_memory(root) == FreeMemory(20 * GIB, MACHINE)


@pytest.mark.parametrize(
    ("cgroup", "groups"),
    [
        ("0::/\n", {".": second(4 * GIB, 2 * GIB, GIB)}),
        ("0::/a/b\n", {"a__b": second("max", GIB), "a": second(4 * GIB, 2 * GIB, GIB)}),
        ("0::/of/the/host\n", {".": second(4 * GIB, 2 * GIB, GIB)}),
        ("5:cpu,cpuacct:/\n4:memory:/box\n0::/\n",
         {"memory__box": first(4 * GIB, 2 * GIB, GIB), "memory": first(UNLIMITED_1, 9 * GIB)}),
        ("4:memory:/docker/8f3a\n0::/\n", {"memory": first(4 * GIB, 2 * GIB, GIB)}),
    ],
    ids=["v2", "v2, limited above", "v2, path of the host", "v1", "v1, path of the host"],
)  # fmt: skip
def test_the_least_that_a_limit_around_it_leaves(
    tmp_path: Path, cgroup: str, groups: dict[str, dict[str, object]]
) -> None:
    assert free_memory(write(tmp_path, cgroup, **groups)) == FreeMemory(3 * GIB, LIMITED)


def test_it_is_told_of_this_machine() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_memory().bytes < total
