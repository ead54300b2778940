"""The one door to the file system for everything that must survive a crash.

Tests come in here: they record the operations, make the file system of every crash out of them,
and let every single one fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open

from apollo_trainer.checkpoints.disk.system_calls import (
    EXCHANGE,
    copy_extended_attributes,
    copy_owner_and_mode,
    is_bound_elsewhere,
    rename_without_replacing,
    renameat2,
)

# Linux: <linux/fs.h> FICLONE, <fcntl.h> SYNC_FILE_RANGE_WRITE, F_SETSIG.
_CLONE = 0x40049409
_START_WRITING = 2
_SET_SIGNAL = 10
_NEW = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_LIBC = ctypes.CDLL(None, use_errno=True)
# What a file system or a mount answers that cannot exchange two folders.
CANNOT_EXCHANGE = frozenset(
    {errno.ENOSYS, errno.EINVAL, errno.EBUSY, errno.EXDEV, errno.EOPNOTSUPP, errno.EPERM}
)
# A file that is described in JSON is far smaller; a bigger one is no such file.
SMALL_FILE_BYTES = 256 << 20


class FileStat(Protocol):
    """What is used of os.stat_result."""

    @property
    def st_mode(self) -> int: ...  # noqa: D102
    @property
    def st_ino(self) -> int: ...  # noqa: D102
    @property
    def st_dev(self) -> int: ...  # noqa: D102
    @property
    def st_nlink(self) -> int: ...  # noqa: D102
    @property
    def st_size(self) -> int: ...  # noqa: D102
    @property
    def st_mtime_ns(self) -> int: ...  # noqa: D102


class FileOps:
    """The real file system. Every method raises OSError; none follows a link at the path's end."""

    # --- reading ----------------------------------------------------------------------------

    def stat(self, path: Path) -> FileStat:
        """Of the path itself, be it a link."""
        return path.lstat()

    def names(self, folder: Path) -> list[str]:
        """Names in a folder, sorted."""
        return sorted(os.listdir(folder))  # noqa: PTH208

    def read_link(self, path: Path) -> str:
        """Where a symbolic link points."""
        return os.readlink(path)  # noqa: PTH115

    def open(self, path: Path, *, write: bool = False) -> int:
        """A descriptor of an existing file."""
        flags = os.O_RDWR if write else os.O_RDONLY
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)

    def pread(self, file: int, size: int, offset: int) -> bytes:
        """At most `size` bytes; fewer at the end of the file only."""
        parts = []
        while size and (part := os.pread(file, size, offset)):
            parts.append(part)
            size, offset = size - len(part), offset + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def preadv(self, file: int, target: memoryview, offset: int) -> int:
        """Reads some bytes into `target`, and returns how many: `read_all` is for callers."""
        return os.preadv(file, [target], offset)

    def tensors(self, path: Path) -> Any:
        """An open safetensors file, as the library's `safe_open`: a tensor is read when it is used.

        Raises OSError, and SafetensorError for what is none.
        """
        return safe_open(path, framework="pt")

    def is_bound_elsewhere(self, folder: Path) -> bool:
        """Whether the folder is mounted under another path too, as far as this process sees."""
        return is_bound_elsewhere(folder)

    def is_open_here_alone(self, file: int) -> bool:
        """Whether no other descriptor of the file and no map of it is left, in any process.

        That is what Linux grants a write lease for (fcntl(2), F_SETLEASE). False where the file
        system cannot tell.
        """
        try:
            # Who opens the file meanwhile waits, and we are sent a signal: by default a deadly one.
            fcntl.fcntl(file, _SET_SIGNAL, signal.SIGURG)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            return False
        return True

    def room(self, folder: Path) -> int:
        """Bytes that a user may still write there."""
        return shutil.disk_usage(folder).free

    # --- writing ----------------------------------------------------------------------------

    def create(self, path: Path, mode: int = 0o600) -> int:
        """A descriptor of a file that did not exist."""
        return os.open(path, _NEW, mode)

    def pwrite(self, file: int, data: memoryview, offset: int) -> int:
        """Writes some of `data`, and returns how many bytes: `write_all` is for callers."""
        return os.pwrite(file, data, offset)

    def start_writing(self, file: int, size: int, offset: int) -> None:
        """Has the kernel begin to write a part back; otherwise the fsync waits for all of it."""
        begin, length = ctypes.c_int64(offset), ctypes.c_int64(size)
        _LIBC.sync_file_range(file, begin, length, _START_WRITING)

    def fsync(self, file: int) -> None:
        """Content and size are on disk. Once failed never again: the pages are marked clean."""
        os.fsync(file)

    def fdatasync(self, file: int) -> None:
        """The same for content that was there before, without the times."""
        os.fdatasync(file)

    def sync_folder(self, folder: Path) -> None:
        """Names in the folder are on disk: a power failure may else undo a rename."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self, file: int) -> None:
        """Of a descriptor of `open` or `create`."""
        os.close(file)

    def clone(self, source: int, target: int) -> None:
        """Shares the blocks of `source` with an empty file, where the file system can."""
        fcntl.ioctl(target, _CLONE, source)

    # --- names ------------------------------------------------------------------------------

    def rename(self, source: Path, target: Path) -> None:
        """Replaces `target`."""
        source.replace(target)

    def exchange(self, one: Path, other: Path) -> None:
        """Two names change places in one step (Linux, renameat2 with RENAME_EXCHANGE)."""
        renameat2(one, other, EXCHANGE)

    def rename_new(self, source: Path, target: Path) -> None:
        """Raises FileExistsError where there is a target already, be it an empty folder."""
        rename_without_replacing(source, target)

    def link(self, source: Path, target: Path) -> None:
        """A second name for a file."""
        os.link(source, target, follow_symlinks=False)

    def symlink(self, points_to: str, path: Path) -> None:
        """A symbolic link."""
        path.symlink_to(points_to)

    def unlink(self, path: Path) -> None:
        """Takes a name away."""
        path.unlink()

    def mkdir(self, folder: Path, mode: int = 0o700) -> None:
        """A new folder."""
        folder.mkdir(mode=mode)

    def rmdir(self, folder: Path) -> None:
        """Takes an empty folder away."""
        folder.rmdir()

    def copy_attributes(self, source: Path, target: Path) -> None:
        """Owner, mode, and extended attributes, as far as the system lets this user."""
        copy_owner_and_mode(source, target)
        copy_extended_attributes(source, target)

    @contextlib.contextmanager
    def locked(self, path: Path) -> Iterator[None]:
        """Holds an exclusive flock of a folder, or of a file, which is made where there is none.

        Raises BlockingIOError while another process does.
        """
        flags = os.O_DIRECTORY if path.is_dir() else os.O_CREAT | os.O_RDWR
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(file)

    # --- made of the above ------------------------------------------------------------------

    def write_all(self, file: int, data: memoryview, offset: int) -> None:
        """Writes all of `data`, also where the system takes it in parts."""
        while data:
            written = self.pwrite(file, data, offset)
            if written <= 0:
                raise OSError(errno.EIO, "the file system takes no more bytes")
            data, offset = data[written:], offset + written

    def read_all(self, file: int, target: memoryview, offset: int) -> None:
        """Fills `target`. Raises OSError where the file ends before."""
        while target:
            size = self.preadv(file, target, offset)
            if size <= 0:
                raise OSError(errno.EIO, f"the file ends at byte {offset}, before its tensors do")
            target, offset = target[size:], offset + size

    def found(self, path: Path) -> FileStat | None:
        """The same as `stat`; None where there is nothing."""
        try:
            return self.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, path: Path) -> bytes:
        """A small file. Raises OSError for one of more than 256 MiB."""
        with self.opened(path) as file:
            data = self.pread(file, SMALL_FILE_BYTES + 1, 0)
        if len(data) > SMALL_FILE_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
        return data

    @contextlib.contextmanager
    def opened(self, path: Path, *, write: bool = False) -> Iterator[int]:
        """`open`, closed again."""
        file = self.open(path, write=write)
        try:
            yield file
        finally:
            self.close(file)

    def remove(self, path: Path) -> None:
        """Takes a name away, a folder with all in it; what is not there is no error."""
        found = self.found(path)
        if found is None:
            return
        if not stat.S_ISDIR(found.st_mode):
            self.unlink(path)
            return
        for name in self.names(folder := path):
            self.remove(folder / name)
        self.rmdir(folder)


FILES = FileOps()
