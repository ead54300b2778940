"""What a result must say of where it came from, and how it is written."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def origin(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and time of a result, as JSON can hold them."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "device": device_name(device),
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": installed("triton"),
            "apollo-torch": installed("apollo-torch"),
        },
    }


def commit() -> str:
    """$APOLLO_COMMIT, else the checkout's, with `+` where files differ; or `unknown`."""
    if os.environ.get("APOLLO_COMMIT"):
        return os.environ["APOLLO_COMMIT"]
    head = _git("rev-parse", "HEAD")
    if head:
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    return "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's name as the kernel gives it, where it does."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def result_path(what: str, device: torch.device) -> Path:
    """`benchmarks/results/<what>-<device>-<day>.json`."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / f"{what}-{slug}-{datetime.datetime.now(datetime.UTC).date()}.json"


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the file whole or not at all: a run that is cut short leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    beside.replace(path)
