"""Anonymous memory with a descriptor, which other processes map and no one can shrink."""

from __future__ import annotations

import errno
import fcntl
import os

from apollo_grpc.errors import FailedPrecondition, refused_call

_LIMITS = (errno.EFBIG, errno.ENOSPC, errno.ENOMEM)


def sealed_memory(name: str, size: int) -> int:
    """A memfd of `size` bytes, sealed against another size.

    Without the seal a truncation by any holder would end all that map it with SIGBUS.

    Raises FailedPrecondition when the system gives none, or not so large a one.
    """
    call, descriptor = "memfd_create", -1
    try:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        call = "ftruncate"
        os.ftruncate(descriptor, size)
        call = "fcntl(F_ADD_SEALS)"
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        raise _refusal(call, size, error) from error
    return descriptor


def _refusal(call: str, size: int, error: OSError) -> FailedPrecondition:
    why = refused_call(call, "weights are shared", error)
    if error.errno in _LIMITS:
        why = (
            f"{size} bytes of shared memory are not to be had ({error.strerror}); raise the limit "
            "on file sizes (ulimit -f) or on memory"
        )
    elif error.errno == errno.EMFILE:
        why = "this process may open no more files; raise that limit (ulimit -n)"
    return FailedPrecondition(f"{why}, and start vLLM again", reason="SHARED_MEMORY_REFUSED")
