"""Memory of the device that trains, by all of its users together."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")


def device_memory(device: torch.device) -> tuple[str, int, int]:
    """Its name as `DeviceMemory` has it, and its bytes in use and in all.

    A CPU's are the machine's, of which the page cache is free.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"cuda:{torch.cuda.get_device_properties(device).uuid}", total - free, total
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = re.search(r"^MemAvailable:\s*(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
    return "cpu", total - int(available[1]) * 1024 if available else 0, total
