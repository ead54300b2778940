"""A trainer rank beside one of vLLM's workers: `python -m apollo_trainer.follow`.

The training server starts it, and tells it on its standard input what all ranks do together. It
serves nobody and keeps no file. What fails on it alone ends it, and with it the attachment.
"""

from __future__ import annotations

import ctypes
import json
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from apollo_grpc.errors import DataLoss, FailedPrecondition, OutOfRange
from apollo_trainer import logs
from apollo_trainer.checkpoints.apollo_state import OPTIMIZER_KEY, load_state
from apollo_trainer.checkpoints.snapshots import restore_part
from apollo_trainer.config import Settings
from apollo_trainer.engine import new_optimizer, prepare, undo_of
from apollo_trainer.optim import Apollo
from apollo_trainer.parallel.followers import READY, join
from apollo_trainer.parallel.parts import gathered
from apollo_trainer.parallel.ranks import RankRefused, Ranks
from apollo_trainer.training.context_check import require_frozen_context
from apollo_trainer.training.evaluate import evaluate
from apollo_trainer.training.guard import LossReached, UpdateRefused
from apollo_trainer.training.options import StateShape
from apollo_trainer.training.plain import apply_settings, to_policy, to_samples
from apollo_trainer.training.step import take_step
from apollo_trainer.training.teacher import top_tokens
from apollo_trainer.weights.attach import Checks, attach
from apollo_trainer.weights.attachment import Attachment
from apollo_trainer.weights.cuda_mapping import device_of
from apollo_trainer.weights.sidecar import Sidecar
from apollo_trainer.weights.verify import log_probabilities, noise_of, probe_tokens

log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1
# What comes up on all ranks, or is told by the one that it came up on.
_ALIKE = (RankRefused, UpdateRefused, LossReached, DataLoss)


class Follower:
    """One rank, attached; its methods are what it is told to do."""

    def __init__(self, attachment: Attachment, settings: Settings):
        self._attachment, self._settings = attachment, settings
        self._model = attachment.model
        self._optimizer: Apollo | None = None
        self._former: Apollo | None = None
        self._ring = undo_of(attachment, settings)

    def do(self, told: dict[str, Any]) -> None:
        """Does what a line of the server's says."""
        work: Callable[..., None] = getattr(self, f"do_{told.pop('do')}")
        with suppress(*_ALIKE):
            work(**told)

    def do_optimizer(self, shape: dict[str, Any], state: str) -> None:
        """Begins with a new state, or with that of a file."""
        try:
            made = new_optimizer(self._attachment, StateShape(**shape), self._settings)
        except FailedPrecondition:
            return  # All ranks refuse it, and go on with what they have.
        self._former, self._optimizer = self._optimizer, made
        if self._ring.keeps:
            made.before_param_write = self._ring.before_write
        if state and (found := load_state(Path(state))):
            tensors, description = found
            made.load_named_state(tensors, description[OPTIMIZER_KEY])

    def do_former_optimizer(self) -> None:
        """Goes on with the one before."""
        self._optimizer = self._former

    def do_forget(self) -> None:
        """Drops all updates that could be undone."""
        self._ring.clear()

    def do_step(
        self, samples: Any, policy: Any, anchors: Any, anchor_weight: float, settings: Any
    ) -> None:
        """Takes a step."""
        assert self._optimizer is not None
        apply_settings(self._optimizer, settings)
        how = to_samples(samples), to_policy(policy)
        more: dict[str, Any] = {"anchors": to_samples(anchors), "anchor_weight": anchor_weight}
        with self._ring.recording(self._attachment.parameters(), self._optimizer):
            take_step(self._model, self._optimizer, *how, **more)

    def do_undo(self, count: int) -> None:
        """Takes its part of the last updates back."""
        assert self._optimizer is not None
        with suppress(OutOfRange, FailedPrecondition):  # on all ranks
            self._ring.undo(count, self._attachment.parameters(), self._optimizer)

    def do_evaluate(self, samples: Any, token_budget: int) -> None:
        """Evaluates samples by the loss that they have."""
        evaluate(self._model, to_samples(samples), token_budget, own_loss=True)

    def do_top(self, samples: Any, k: int, token_budget: int) -> None:
        """Finds likely tokens."""
        top_tokens(self._model, to_samples(samples), k, token_budget)

    def do_score(self, tokens: list[int]) -> None:
        """Scores tokens."""
        log_probabilities(self._model, tokens)

    def do_noise(self, tokens: list[int]) -> None:
        """Measures rounding."""
        noise_of(self._model, tokens, torch.zeros(len(tokens) - 1))()

    def do_state(self) -> None:
        """Gives its part of the optimizer's state."""
        assert self._optimizer is not None
        self._optimizer.named_state()

    def do_fingerprint(self) -> None:
        """Adds its part of the weights' digest."""
        self._attachment.fingerprint()

    def do_put(self, description: dict[str, Any]) -> None:
        """Makes its part of a snapshot the live one."""
        assert self._optimizer is not None
        self._ring.settle()
        keep = self._ring.add if self._ring.keeps else None
        restore_part(description, self._attachment.parameters(), self._optimizer, keep)

    def do_read(self, root: str) -> None:
        """Gives its part of a parameter."""
        own = self._attachment.parameters()[root].detach()
        gathered(own, self._attachment.regions[root], self._attachment.ranks)


def attached(begin: dict[str, Any], settings: Settings) -> Attachment:
    """Attaches as the first rank does, with a model that computes by the same products.

    What all ranks have whole is stepped by each: other roundings on one of them would part it.
    """
    sidecar, checks = Sidecar(settings.sidecar), Checks(**begin["checks"])
    device = None
    if begin["on_gpus"]:
        device = device_of(sidecar.manifest(begin["rank"]).buffers)
    ranks = Ranks(join(Path(begin["meet"]), begin["rank"], begin["size"], device))
    return attach(sidecar, begin["epoch"], checks=checks, ranks=ranks, prepare=prepare)


def main() -> None:
    """Attaches, and does what it is told until its standard input ends."""
    # It is of no use without the server, however that ended.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    begin = json.loads(sys.stdin.readline())
    settings = Settings.model_validate(begin["settings"])
    logs.begin(settings.log_format, settings.log_level)
    print(READY, flush=True)
    attachment = attached(begin, settings)
    tokens = probe_tokens(attachment.model, attachment.max_model_len)
    require_frozen_context(attachment.model, tokens)
    follower = Follower(attachment, settings)
    for line in sys.stdin:
        follower.do(json.loads(line))


if __name__ == "__main__":
    main()
