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
from typing import Any

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
# Errors of a file system or a mount that cannot exchange two folders.
CANNOT_EXCHANGE = frozenset(
    {errno.ENOSYS, errno.EINVAL, errno.EBUSY, errno.EXDEV, errno.EOPNOTSUPP, errno.EPERM}
)
# Manifests and indexes are far smaller.
SMALL_FILE_BYTES = 256 << 20


class FileOps:
    """The real file system. Every method raises OSError; none follows a link at the path's end."""

    # --- reading ----------------------------------------------------------------------------

    def stat(self, path: Path) -> os.stat_result:
        """lstat: of a link, not of what it points to."""
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
        """Reads `size` bytes; fewer only at the end of the file."""
        parts = []
        while size and (part := os.pread(file, size, offset)):
            parts.append(part)
            size, offset = size - len(part), offset + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def preadv(self, file: int, target: memoryview, offset: int) -> int:
        """Reads some bytes into `target`; returns how many. `read_all` reads all."""
        return os.preadv(file, [target], offset)

    def tensors(self, path: Path) -> Any:
        """The library's `safe_open`: reads a tensor when it is used.

        Raises OSError, and SafetensorError for what is no safetensors file.
        """
        return safe_open(path, framework="pt")

    def is_bound_elsewhere(self, folder: Path) -> bool:
        """Whether the folder is mounted under another path too, as far as this process sees."""
        return is_bound_elsewhere(folder)

    def is_open_here_alone(self, file: int) -> bool:
        """Whether no process has another descriptor or a map of the file; False where unknown.

        Linux grants a write lease then only (fcntl(2), F_SETLEASE).
        """
        try:
            # Whoever opens the file meanwhile waits, and we get a signal: the default one kills.
            fcntl.fcntl(file, _SET_SIGNAL, signal.SIGURG)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            return False
        return True

    def room(self, folder: Path) -> int:
        """Free bytes of the disk, for a user that is not root."""
        return shutil.disk_usage(folder).free

    # --- writing ----------------------------------------------------------------------------

    def create(self, path: Path, mode: int = 0o600) -> int:
        """Makes a file; returns its descriptor. Raises FileExistsError where there is one."""
        return os.open(path, _NEW, mode)

    def pwrite(self, file: int, data: memoryview, offset: int) -> int:
        """Writes some of `data`; returns how many bytes. `write_all` writes all."""
        return os.pwrite(file, data, offset)

    def start_writing(self, file: int, size: int, offset: int) -> None:
        """Starts the write-back of a part, so that the fsync has less to wait for."""
        begin, length = ctypes.c_int64(offset), ctypes.c_int64(size)
        _LIBC.sync_file_range(file, begin, length, _START_WRITING)

    def fsync(self, file: int) -> None:
        """Puts content and size on disk. Never repeat a failed one: its pages are marked clean."""
        os.fsync(file)

    def fdatasync(self, file: int) -> None:
        """fsync without the file's times, for a file that kept its size."""
        os.fdatasync(file)

    def sync_folder(self, folder: Path) -> None:
        """fsync of a folder: without it a power failure may undo a rename in it."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self, file: int) -> None:
        """Closes a descriptor of `open` or `create`."""
        os.close(file)

    def clone(self, source: int, target: int) -> None:
        """Makes an empty file share the blocks of `source`, where the file system can."""
        fcntl.ioctl(target, _CLONE, source)

    # --- names ------------------------------------------------------------------------------

    def rename(self, source: Path, target: Path) -> None:
        """Renames, and replaces `target`."""
        source.replace(target)

    def exchange(self, one: Path, other: Path) -> None:
        """Swaps two names in one step (Linux, renameat2 with RENAME_EXCHANGE)."""
        renameat2(one, other, EXCHANGE)

    def rename_new(self, source: Path, target: Path) -> None:
        """Renames. Raises FileExistsError where `target` exists, even as an empty folder."""
        rename_without_replacing(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Gives a file a second name."""
        os.link(source, target, follow_symlinks=False)

    def symlink(self, points_to: str, path: Path) -> None:
        """Makes a symbolic link."""
        path.symlink_to(points_to)

    def unlink(self, path: Path) -> None:
        """Removes a name."""
        path.unlink()

    def mkdir(self, folder: Path, mode: int = 0o700) -> None:
        """Makes a folder."""
        folder.mkdir(mode=mode)

    def rmdir(self, folder: Path) -> None:
        """Removes an empty folder."""
        folder.rmdir()

    def copy_attributes(self, source: Path, target: Path) -> None:
        """Copies owner, mode and extended attributes, as far as this user may set them."""
        copy_owner_and_mode(source, target)
        copy_extended_attributes(source, target)

    @contextlib.contextmanager
    def locked(self, path: Path) -> Iterator[None]:
        """Holds an exclusive flock of a folder, or of a file, which it makes where there is none.

        Raises BlockingIOError while another process holds it.
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
        """Writes all of `data`."""
        while data:
            written = self.pwrite(file, data, offset)
            if written <= 0:
                raise OSError(errno.EIO, "the file system takes no more bytes")
            data, offset = data[written:], offset + written

    def read_all(self, file: int, target: memoryview, offset: int) -> None:
        """Fills `target`. Raises OSError where the file is too short."""
        while target:
            size = self.preadv(file, target, offset)
            if size <= 0:
                raise OSError(errno.EIO, f"the file ends at byte {offset}, before its tensors do")
            target, offset = target[size:], offset + size

    def found(self, path: Path) -> os.stat_result | None:
        """`stat`; None where there is nothing."""
        try:
            return self.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, path: Path) -> bytes:
        """The content of a small file. Raises OSError for one of more than 256 MiB."""
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

    @contextlib.contextmanager
    def created(self, path: Path, mode: int = 0o600) -> Iterator[int]:
        """`create`, closed again."""
        file = self.create(path, mode)
        try:
            yield file
        finally:
            self.close(file)

    def is_folder(self, path: Path) -> bool:
        """Whether the path is a folder; False for a link to one."""
        found = self.found(path)
        return found is not None and stat.S_ISDIR(found.st_mode)

    def make_folders(self, folder: Path, mode: int = 0o700) -> None:
        """Makes a folder and the missing ones above it; does nothing where it exists."""
        if not self.found(folder):
            self.make_folders(folder.parent, mode)
            # Another thread may come first.
            with contextlib.suppress(FileExistsError):
                self.mkdir(folder, mode)

    def remove(self, path: Path) -> None:
        """Removes a file, or a folder with all in it; does nothing where there is none."""
        if self.is_folder(path):
            for name in self.names(path):
                self.remove(path / name)
            self.rmdir(path)
        elif self.found(path):
            self.unlink(path)


FILES = FileOps()
