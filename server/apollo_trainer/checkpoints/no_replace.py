"""A rename that never replaces anything, not even an empty folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from apollo_trainer.checkpoints.file_ops import renameat2

_NOREPLACE = 1
# What a filesystem or a kernel without the call answers.
_REFUSED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def rename_without_replacing(source: Path, target: Path) -> None:
    """Raises FileExistsError where the target exists, OSError where the disk refuses."""
    try:
        renameat2(source, target, _NOREPLACE)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        source.rename(target)
