"""A rename that never replaces anything, not even an empty folder."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_CWD, _NOREPLACE = -100, 1
# What a filesystem or a kernel without the call answers.
_REFUSED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def rename_without_replacing(source: Path, target: Path) -> None:
    """Raises FileExistsError where the target exists, OSError where the disk refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "renameat2", None)
    names = (os.fsencode(source), os.fsencode(target))
    if call is not None and call(_CWD, names[0], _CWD, names[1], _NOREPLACE) == 0:
        return
    number = ctypes.get_errno() if call is not None else errno.ENOSYS
    if number not in _REFUSED:
        raise OSError(number, os.strerror(number), str(target))
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)
