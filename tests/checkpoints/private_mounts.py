"""File systems that only one test sees: mounts in a mount namespace of the thread that it runs on.

They end with the thread, also when the test fails. Servers and processes that the test starts see
them too.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS, <linux/sched.h>
_LIBC = ctypes.CDLL(None, use_errno=True)
# Any user may enter it, as none may pytest's own temporary folders. Empty on most machines.
DISK = Path("/mnt")
NOBODY = 65534


def with_private_mounts(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test where it may mount; skips it, and says why, where this machine lets nobody."""

    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        # A thread of its own: the namespace of pytest's thread stays the machine's.
        with ThreadPoolExecutor(1, "private-mounts") as thread:
            if why := thread.submit(_enter).result():
                pytest.skip(why)
            thread.submit(test, *arguments, **fixtures).result()

    return run


def _enter() -> str:
    """Makes the namespace of this thread; returns why it cannot."""
    if os.geteuid() != 0:
        return "only root may mount; run the tests as root, in a container for one"
    if _LIBC.unshare(_NEW_MOUNTS):
        return f"this machine makes no mount namespace: {os.strerror(ctypes.get_errno())}"
    made = _run("mount", "--make-rprivate", "/")
    return "" if made.returncode == 0 else f"this machine mounts nothing: {made.stderr}"


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def mount(*arguments: object) -> None:
    """`mount` with these arguments; it must succeed."""
    done = _run("mount", *arguments)
    assert done.returncode == 0, done.stderr


def tmpfs(folder: Path = DISK, size: str = "64M") -> Path:
    """A file system of so many bytes, in memory."""
    folder.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size},mode=0755", "tmpfs", folder)
    return folder


def read_only(folder: Path) -> None:
    """Whatever is mounted there takes no more writes."""
    mount("-o", "remount,ro", folder)


def on_loop(image: Path, mkfs: tuple[str, ...], folder: Path = DISK, size: int = 400 << 20) -> Path:
    """A file system of a kind in a file; a missing `mkfs` skips the test, as does the kernel."""
    with image.open("wb") as file:
        file.truncate(size)
    try:
        made = _run(*mkfs, image)
    except FileNotFoundError:
        pytest.skip(f"{mkfs[0]} is not installed here")
    assert made.returncode == 0, made.stderr
    mounted = _run("mount", "-o", "loop", image, folder)
    if mounted.returncode:
        pytest.skip(f"this machine mounts no such file system: {mounted.stderr}")
    return folder


@contextmanager
def as_user(user: int) -> Iterator[None]:
    """File access of this thread is that user's, without root's rights (setfsuid(2))."""
    _LIBC.setfsgid(user)
    _LIBC.setfsuid(user)
    try:
        yield
    finally:
        _LIBC.setfsuid(0)
        _LIBC.setfsgid(0)


def used_bytes(folder: Path) -> int:
    """Of the file system, once all that was written is on it."""
    _run("sync", "-f", folder)
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def fill(disk: Path, free: int) -> Path:
    """Takes all but so many bytes of a file system."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        found = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - free)
    return filler
