"""A training server that is killed while it probes: vLLM goes on with the weights as they were."""

from __future__ import annotations

from typing import Any

import torch

from tests.waiting import HANG


def test_a_kill_in_the_middle_of_a_probe_leaves_no_changed_byte(
    start_engine: Any, start_process: Any, wait: Any
) -> None:
    engine = start_engine()
    before = engine.model.values()

    def as_before() -> bool:
        return all(torch.equal(before[name], t) for name, t in engine.model.values().items())

    process = start_process("--rank", "8")

    def kill(number: int) -> None:
        if number == 5:
            process.kill()

    engine.client.on_probe = kill
    assert process.wait(HANG) == -9
    leases = engine.engine.leases
    wait(lambda: leases.active and not as_before(), "the change")
    went_on: list[bool] = []
    engine.client.before["resume_generation"] = lambda: went_on.append(as_before())
    # Its length is tested elsewhere; this one has half a minute to go.
    leases.acquire(leases._lease_id, 1e-3, "keep")
    wait(lambda: went_on, "the end of the lease")
    assert went_on == [True]
    assert as_before()
