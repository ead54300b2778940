"""A system that refuses calls, as a container's seccomp profile does, for processes of tests."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

# Of Linux on x86-64, <asm/unistd_64.h>.
NUMBERS = {
    "ioctl": 16,
    "madvise": 28,
    "flock": 73,
    "fsync": 74,
    "fdatasync": 75,
    "ftruncate": 77,
    "link": 86,
    "symlink": 88,
    "chmod": 90,
    "chown": 92,
    "prctl": 157,
    "setxattr": 188,
    "listxattr": 194,
    "sched_setaffinity": 203,
    "linkat": 265,
    "sync_file_range": 277,
    "fallocate": 285,
    "process_vm_readv": 310,
    "kcmp": 312,
    "renameat2": 316,
    "memfd_create": 319,
    "copy_file_range": 326,
    "statx": 332,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
}
VARIABLE = "TEST_REFUSED_CALLS"
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
# <linux/bpf_common.h>, <linux/seccomp.h>: load the number, compare, answer.
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse(*names: str, number: int = errno.EPERM) -> None:
    """From now on this process and those that it starts are refused these calls."""
    steps = [struct.pack("HBBI", _LOAD, 0, 0, 0)]
    for name in names:
        steps.append(struct.pack("HBBI", _EQUAL, 0, 1, NUMBERS[name]))
        steps.append(struct.pack("HBBI", _RETURN, 0, 0, _ERRNO | number))
    steps.append(struct.pack("HBBI", _RETURN, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(steps))
    program = _Program(len(steps), ctypes.cast(code, ctypes.c_char_p))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
    assert libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program)) == 0, ctypes.get_errno()


def refuse_named() -> None:
    """The same for the calls that `VARIABLE` names; runs before a program begins."""
    refuse(*os.environ[VARIABLE].split())
