"""What a step needs of a GPU: told at the attachment, and where a step is refused for it.

Here the memory is this machine's, and said to be a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from apollo_grpc.v1 import status_pb2
from apollo_trainer.engine import owner
from apollo_trainer.engine.open_session import compile_passes, find_needs
from apollo_trainer.engine.session import Session
from apollo_trainer.training.options import OptimizerOptions
from apollo_trainer.training.twin import twin_of
from apollo_trainer.weights.fingerprint import fingerprint
from tests.waiting import wait_until

Start = Callable[..., Any]
ATTACHED = status_pb2.ATTACHMENT_STATE_ATTACHED
FREE = 5_200_000_000


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """Those that were opened, each with a twin of its model."""
    opened, open_session = list[Session](), owner.open_session

    def open_with_twin(*args: Any) -> Session:
        session = open_session(*args)
        session.twin = twin_of(session.attachment.model)
        opened.append(session)
        return session

    monkeypatch.setattr(owner, "open_session", open_with_twin)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (FREE, 2 * FREE))
    return opened


def test_the_log_and_the_status_say_what_steps_need(
    start_engine: Start,
    start_trainer: Start,
    sessions: list[Session],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    start_engine()
    trainer = start_trainer()
    trainer.wait_for(ATTACHED)
    wait_until(lambda: " GB of the device. " in trainer.status.attachment_detail, "what is needed")
    (session,) = sessions
    assert session.needs in trainer.status.attachment_detail
    assert all(sentence in caplog.text for sentence in session.needs.split(". "))
    assert session.needs.endswith(" 5.2 GB are free.")


def test_a_step_without_enough_memory_says_what_it_needs_and_what_is_free(
    start_engine: Start, start_trainer: Start, sessions: list[Session], all_events: Start
) -> None:
    start_engine()
    trainer = start_trainer()
    trainer.wait_for(ATTACHED)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    (session,) = sessions
    session.attachment.model.model.norm.register_forward_pre_hook(fail)
    failure = all_events(trainer.submit())[-1].finished.failure
    assert failure.reason == "OUT_OF_MEMORY"
    assert "GB of the device, and 5.2 GB are free." in failure.message


def test_nothing_is_told_of_a_model_whose_passes_go_by_values(
    start_engine: Start, start_trainer: Start, sessions: list[Session]
) -> None:
    start_engine()
    start_trainer().wait_for(ATTACHED)
    (session,) = sessions
    session.twin.model.norm.register_forward_hook(lambda *a: float(a[2].sum()) and None)
    session.needs = ""
    find_needs(session)
    assert session.needs == ""


@pytest.mark.parametrize("fails", [False, True], ids=["found", "no memory"])
def test_kernels_are_compiled_by_a_step_that_is_not_written(
    start_engine: Start, start_trainer: Start, sessions: list[Session], fails: bool
) -> None:
    start_engine()
    start_trainer().wait_for(ATTACHED)
    (session,) = sessions
    passes, before = list[int](), fingerprint(session.attachment.parameters())

    def passing(_: Any, given: tuple[torch.Tensor]) -> None:
        passes.append(given[0].shape[1])
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    session.attachment.model.model.norm.register_forward_pre_hook(passing)
    compile_passes(session)
    if not fails:
        # A context and what follows it, of lengths that sixteen divides, and of others.
        assert [length % 16 == 0 for length in passes] == [True, True, False, False]
    assert passes
    assert fingerprint(session.attachment.parameters()) == before
    assert session.optimizer.step_count == 0
    assert all(p.grad is None for p in session.attachment.model.parameters())


def test_the_weight_version_is_the_sessions_never_falls_and_is_what_the_status_shows(
    attached: Any,
) -> None:
    _, trainer = attached
    session, epoch = trainer.owner.session(), trainer.owner.session().attachment.epoch
    with session.trying(OptimizerOptions()):
        trainer.owner.engine_told(epoch, 7, [])
    for told, version in ((epoch, 5), ("another engine", 9)):
        trainer.owner.engine_told(told, version, [])
        assert session.weight_version == trainer.status.weight_version == 7
    assert session.extra()["weight_version"] == 7
