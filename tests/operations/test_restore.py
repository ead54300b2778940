"""A restore of a snapshot of another kind, where it is not carried out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from apollo_grpc.errors import Aborted
from apollo_trainer.operations import restore
from apollo_trainer.training.options import StateShape


def test_one_that_is_stopped_before_it_writes_leaves_all_ranks_their_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other ranks have made the new state by then: the next step would be of two kinds."""
    told: list[str] = []
    state = SimpleNamespace(extra={"shape": vars(StateShape(rank=8))})
    session = SimpleNamespace(
        shape=StateShape(),
        checkpoints=SimpleNamespace(load=lambda snapshot: state),
        new_optimizer=lambda shape: told.append("optimizer"),
        attachment=SimpleNamespace(ranks=SimpleNamespace(tell=told.append)),
    )
    found = SimpleNamespace(id="s", weights_bytes=1)
    monkeypatch.setattr(restore, "find_snapshot", lambda session, name: found)

    def stopped() -> NoReturn:
        raise Aborted("It was cancelled.")

    one: Any = restore.Restore.__new__(restore.Restore)
    one._session = session
    job: Any = SimpleNamespace(progress=lambda *told: None, close=stopped)
    with pytest.raises(Aborted):
        one.snapshot("s", job)
    assert told == ["optimizer", "former_optimizer"]
