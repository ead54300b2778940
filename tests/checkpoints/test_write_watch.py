"""Whoever must know of a write is told of it; a sync reads what was written, and no more."""

from __future__ import annotations

import torch

from apollo_trainer.checkpoints.write_watch import WriteVersions, WriteWatch
from apollo_trainer.optim import Apollo


def test_a_step_moves_the_versions_of_what_it_writes_alone() -> None:
    torch.manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(8, 8)) for name in ("a", "b")}
    versions, watch = WriteVersions(), WriteWatch()
    optimizer = Apollo(parameters.items(), rank=2)
    optimizer.before_param_write = watch
    watch.add(versions.before_write)
    before = {name: versions.of(p) for name, p in parameters.items()}
    parameters["a"].grad = torch.randn(8, 8)
    optimizer.step()
    once = {name: versions.of(p) for name, p in parameters.items()}
    assert once["a"] != before["a"]
    assert once["b"] == before["b"]
    optimizer.step()
    assert versions.of(parameters["a"]) != once["a"]


def test_no_two_processes_agree_on_a_version_that_they_never_wrote() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert WriteVersions().of(parameter) != WriteVersions().of(parameter)


def test_a_watcher_is_told_within_its_block_alone() -> None:
    watch, told, parameter = WriteWatch(), list[torch.Tensor](), torch.zeros(1)
    with watch.telling(told.append):
        watch(parameter)
    watch(parameter)
    watch.remove(told.append)
    assert told == [parameter]
