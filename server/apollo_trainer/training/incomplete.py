"""A step that failed once a part of it was written."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from apollo_grpc.errors import Internal
from apollo_trainer.optim import Apollo

log = logging.getLogger(__name__)


class StepIncomplete(Internal):
    """A step failed while it was written: part of it is in the weights, and cannot be taken out."""

    default_reason = "STEP_INCOMPLETE"


@contextmanager
def telling_incomplete(optimizer: Apollo) -> Iterator[None]:
    """Around a write: turns an error into StepIncomplete if part of the step is in the weights.

    An error before the first write passes as it is. A device's errors come up when its results
    are read: read them inside.
    """
    try:
        yield
    except BaseException as error:
        if not optimizer.wrote:
            raise
        log.error("a step failed while it was written", exc_info=error)
        raise StepIncomplete(
            "A step failed while it was written: part of it is in the weights and in the "
            "optimizer's state. The server's log has the cause. Restore a snapshot, or restart "
            "vLLM to load the model directory again."
        ) from error
