"""Linux calls that `os` lacks, or does not have in the form needed here."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import stat
from pathlib import Path

log = logging.getLogger(__name__)
_LIBC = ctypes.CDLL(None, use_errno=True)
# <linux/fs.h> RENAME_NOREPLACE and RENAME_EXCHANGE, <fcntl.h> AT_FDCWD.
_NOREPLACE, EXCHANGE, _HERE = 1, 2, -100
# What a filesystem or a kernel without the call answers, or a container that knows it not.
_REFUSED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def renameat2(source: Path, target: Path, flags: int) -> None:
    """Linux's renameat2(2). Raises OSError, with ENOSYS where the C library lacks it."""
    if not hasattr(_LIBC, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(target))
    if _LIBC.renameat2(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def rename_without_replacing(source: Path, target: Path) -> None:
    """Renames. Raises FileExistsError where `target` exists, even as an empty folder; OSError."""
    try:
        renameat2(source, target, _NOREPLACE)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        source.rename(target)


def copy_owner_and_mode(source: Path, target: Path) -> None:
    """Gives `target` the owner and the mode of `source`, so that the same users can read it."""
    old, new = source.stat(), target.stat()
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        # Only root may give files away; whoever may write a folder need not own it.
        with contextlib.suppress(PermissionError):
            os.chown(target, old.st_uid, old.st_gid)
    target.chmod(stat.S_IMODE(old.st_mode))


def copy_extended_attributes(source: Path, target: Path) -> None:
    """Gives `target` the ACLs, labels and other attributes of `source`, and no others.

    Logs one that the system refuses. Raises nothing.
    """
    try:
        wanted, found = set(os.listxattr(source)), set(os.listxattr(target))
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            log.warning("the extended attributes of %s were not kept: %s", source.name, error)
        return
    for name in sorted(wanted | found):
        try:
            if name not in wanted:
                os.removexattr(target, name)
            elif name not in found or os.getxattr(source, name) != os.getxattr(target, name):
                os.setxattr(target, name, os.getxattr(source, name))
        except OSError as error:
            log.warning("%s of %s was not kept: %s", name, source.name, error.strerror)


def is_bound_elsewhere(folder: Path) -> bool:
    """Whether a mount that this thread sees shows the folder under another path as well.

    False where the system does not tell.
    """
    found = folder.stat()
    device = f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}"
    mounts = Path("/proc/thread-self/mountinfo")
    for line in mounts.read_text().splitlines() if mounts.exists() else []:
        _, _, of, root, point, *_ = line.split(" ")
        if of != device or root == "/":
            continue
        # A space is \\040 there (proc_pid_mountinfo(5)).
        path = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point))
        with contextlib.suppress(OSError):
            if path != folder and path.stat().st_ino == found.st_ino:
                return True
    return False
