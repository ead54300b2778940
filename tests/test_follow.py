"""A trainer rank beside the server's own; with real workers: `vllm/test_trainer_ranks.py`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from apollo_trainer import follow
from apollo_trainer.config import Settings
from apollo_trainer.engine import owner
from apollo_trainer.weights.attach import Checks


def test_its_model_is_prepared_as_the_first_ranks_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By other products than rank 0's it would round what both have whole otherwise."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(follow, "join", lambda meet, rank, size: None)
    monkeypatch.setattr(follow, "attach", lambda sidecar, epoch, **how: given.update(how))
    begin = {"meet": "m", "rank": 1, "size": 2, "epoch": "e", "checks": asdict(Checks())}
    follow.attached(begin, Settings())
    assert given["prepare"] is owner.prepare
