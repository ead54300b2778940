"""A trainer rank beside the server's own; with real workers: `vllm/test_trainer_ranks.py`."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast

import pytest

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer import follow
from apollo_trainer.checkpoints.snapshots import UndoRing
from apollo_trainer.config import Settings
from apollo_trainer.engine import owner
from apollo_trainer.weights.attach import Checks
from apollo_trainer.weights.attachment import Attachment


def test_its_model_is_prepared_as_the_first_ranks_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By other products than rank 0's it would round what both have whole otherwise."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(follow, "join", lambda meet, rank, size, device: None)
    monkeypatch.setattr(follow, "attach", lambda sidecar, epoch, **how: given.update(how))
    begin = {"meet": "m", "rank": 1, "size": 2, "epoch": "e", "checks": asdict(Checks())}
    begin["on_gpus"] = False
    follow.attached(begin, Settings())
    assert given["prepare"] is owner.prepare


def test_a_state_that_does_not_suit_is_refused_and_the_one_before_gone_on_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first rank refuses it as well; one that ended would take the attachment with it."""
    made: list[Any] = [SimpleNamespace(), SimpleNamespace(), None]

    def new_optimizer(*given: Any) -> Any:
        if (optimizer := made.pop(0)) is None:
            raise FailedPrecondition("It does not suit.")
        return optimizer

    monkeypatch.setattr(follow, "new_optimizer", new_optimizer)
    monkeypatch.setattr(follow, "undo_of", lambda *given: UndoRing(0, keeps=False))
    rank, (first, second, _) = (
        follow.Follower(cast("Attachment", SimpleNamespace(model=None)), Settings()),
        [*made],
    )
    asked = {"shape": {"rank": 8}, "state": ""}
    rank.do({"do": "optimizer", **asked})
    rank.do({"do": "optimizer", **asked})
    assert rank._optimizer is second
    rank.do({"do": "optimizer", **asked})
    assert rank._optimizer is second
    rank.do({"do": "former_optimizer"})
    assert rank._optimizer is first
