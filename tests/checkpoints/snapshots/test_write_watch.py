"""Whoever must know of a write is told of it; a sync reads what was written, and no more."""

from __future__ import annotations

import pytest
import torch

from apollo_trainer.checkpoints.snapshots.write_watch import WriteVersions, WriteWatch
from apollo_trainer.optim import Apollo


def watched(parameters: dict[str, torch.nn.Parameter]) -> tuple[Apollo, WriteVersions]:
    """An optimizer, and the versions of what it writes."""
    versions, watch = WriteVersions(), WriteWatch()
    optimizer = Apollo(parameters.items(), rank=2)
    optimizer.before_param_write = watch
    watch.add(versions.before_write)
    return optimizer, versions


@pytest.fixture
def parameters() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(8, 8)) for name in ("a", "b")}


def test_a_step_moves_the_versions_of_what_it_writes_alone(
    parameters: dict[str, torch.nn.Parameter],
) -> None:
    optimizer, versions = watched(parameters)
    before = {name: versions.of(p) for name, p in parameters.items()}
    parameters["a"].grad = torch.randn(8, 8)
    optimizer.step()
    once = {name: versions.of(p) for name, p in parameters.items()}
    assert once["a"] != before["a"]
    assert once["b"] == before["b"]
    optimizer.step()
    assert versions.of(parameters["a"]) != once["a"]


def test_the_version_is_another_one_after_every_write_and_for_every_optimizer(
    parameters: dict[str, torch.nn.Parameter],
) -> None:
    (one, versions), (_, others) = watched(parameters), watched(parameters)
    written = parameters["a"]
    seen = [versions.of(written), others.of(written)]
    written.grad = torch.randn(8, 8)
    one.step()
    seen.append(versions.of(written))
    assert versions.of(written) == seen[-1]
    one.step()
    seen.append(versions.of(written))
    assert len(set(seen)) == 4


def test_a_write_that_is_forbidden_leaves_the_version(
    parameters: dict[str, torch.nn.Parameter],
) -> None:
    def forbid() -> None:
        raise RuntimeError("no")

    optimizer, versions = watched(parameters)
    before, optimizer.before_write = versions.of(parameters["a"]), forbid
    parameters["a"].grad = torch.randn(8, 8)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    assert versions.of(parameters["a"]) == before


def test_no_two_processes_agree_on_a_version_that_they_never_wrote() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert WriteVersions().of(parameter) != WriteVersions().of(parameter)


def test_a_watcher_is_told_until_it_is_removed() -> None:
    watch, told, parameter = WriteWatch(), list[torch.Tensor](), torch.zeros(1)
    watch.add(told.append)
    watch(parameter)
    watch.remove(told.append)
    watch(parameter)
    watch.remove(told.append)
    assert told == [parameter]
