"""The process that owns the mapped memory: is it still there?

A stream of beats tells of its end within moments; the kernel tells at once. What is asked right
before a write is the kernel: memory of a GPU whose owner has ended may belong to somebody else.
"""

from __future__ import annotations

import os
import select

from apollo_grpc import process_state
from apollo_grpc.errors import refused_call
from apollo_trainer.weights.manifest import refusal


class Producer:
    """A process of this machine, by a descriptor that no later process of the same pid takes over.

    Args:
        pid: of vLLM's worker, as its manifest says.
        namespace: inode of the PID namespace that `pid` counts in.

    Raises FailedPrecondition when there is no such process, or it counts in another namespace.
    """

    def __init__(self, pid: int, namespace: int):
        if namespace != process_state.namespace():
            raise refusal(
                "ANOTHER_PID_NAMESPACE",
                "vLLM's worker runs in another PID namespace, so that its end could not be seen. "
                "Run both in one container, or give them one namespace (--pid).",
            )
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise refusal(
                "BUFFER_GONE", f"vLLM's worker, process {pid}, is not there ({error.strerror})."
            ) from None
        except OSError as error:
            why = refused_call("pidfd_open", "vLLM's end is seen", error)
            raise refusal("SYSTEM_CALL_REFUSED", f"{why[0].upper()}{why[1:]}.") from None

    @property
    def alive(self) -> bool:
        """Whether it has not ended; a few microseconds."""
        # One for each call: threads may not share a poll object.
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return not poll.poll(0)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
