"""A probe's change touches the elements that it names, and is put back bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar import changed_bytes
from apollo_sidecar.changed_bytes import ChangedBytes
from apollo_sidecar.memfd_weights import MemfdWeights


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(6, 5))
        self.second = nn.Parameter(torch.randn(4, 8).bfloat16())
        self.zeros = nn.Parameter(torch.zeros(7))
        self.register_buffer("steps", torch.arange(5))


class Shared:
    """A module in shared memory, and what its bytes were."""

    def __init__(self):
        self.module = Small()
        self.live = MemfdWeights(self.module)
        self.changed = ChangedBytes()
        self.before = self.bytes()

    def bytes(self):
        return bytes(self.live.storages[0])

    def change(self, tensor, rows=(0,), deviation=2.0, **fields):
        entry = next(t for t in self.live.tensors if t.name == tensor)
        width = entry.dtype.itemsize
        elements = fields.pop("elements", entry.shape[-1])
        starts = [entry.offset_bytes + row * entry.stride[0] * width for row in rows]
        return pb.WeightChange(
            tensor=tensor,
            offset_bytes=fields.pop("offset_bytes", starts),
            elements=elements,
            deviation=deviation,
            seed=3,
        )


@pytest.fixture
def shared():
    return Shared()


def test_only_the_named_rows_are_changed_and_they_come_back(shared):
    before = shared.module.first.detach().clone()
    shared.changed.change(shared.live, [shared.change("first", rows=(1, 4))])
    moved = (shared.module.first != before).any(1)
    assert moved.tolist() == [False, True, False, False, True, False]
    shared.changed.put_back()
    assert shared.bytes() == shared.before


def test_a_tensor_of_zeros_is_changed_too(shared):
    shared.changed.change(shared.live, [shared.change("zeros", elements=7)])
    assert shared.module.zeros.all()


def test_the_next_change_puts_the_one_before_back(shared):
    shared.changed.change(shared.live, [shared.change("first", rows=(0, 1, 2))])
    shared.changed.change(shared.live, [shared.change("second", rows=(3,))])
    shared.changed.change(shared.live, [])
    assert shared.bytes() == shared.before


def test_two_changes_of_the_same_elements_are_put_back_as_well(shared):
    twice = [shared.change("first", rows=(2,)), shared.change("first", rows=(2, 3), deviation=9.0)]
    shared.changed.change(shared.live, twice)
    assert shared.bytes() != shared.before
    shared.changed.put_back()
    assert shared.bytes() == shared.before


def test_a_seed_makes_the_same_change_each_time(shared):
    shared.changed.change(shared.live, [shared.change("second")])
    once = shared.bytes()
    shared.changed.put_back()
    shared.changed.change(shared.live, [shared.change("second")])
    assert shared.bytes() == once


@pytest.mark.parametrize(
    "wrong",
    [
        {"tensor": "nobody"},
        {"tensor": "steps"},
        {"tensor": "first", "elements": 0},
        {"tensor": "first", "elements": -1},
        {"tensor": "first", "elements": 31},
        {"tensor": "first", "offset_bytes": []},
        {"tensor": "first", "offset_bytes": [-4]},
        {"tensor": "first", "offset_bytes": [2]},
        {"tensor": "first", "offset_bytes": [0, 1 << 40]},
    ],
)
def test_a_change_outside_its_tensor_is_refused_before_anything_is_changed(shared, wrong):
    given = {"offset_bytes": [0], "elements": 5, "deviation": 2.0} | wrong
    good = shared.change("second")
    with pytest.raises(FailedPrecondition) as refused:
        shared.changed.change(shared.live, [good, pb.WeightChange(**given)])
    assert refused.value.reason == "PROBE_INVALID"
    assert shared.bytes() == shared.before


def test_a_change_of_too_many_bytes_is_refused(shared, monkeypatch):
    monkeypatch.setattr(changed_bytes, "MAX_CHANGED_BYTES", 16)
    with pytest.raises(FailedPrecondition, match="more than 16 bytes"):
        shared.changed.change(shared.live, [shared.change("first")])
    assert shared.bytes() == shared.before


def test_bytes_that_do_not_come_back_are_told_and_tried_again(shared):
    shared.changed.change(shared.live, [shared.change("first")])
    (place, old), *_ = shared.changed._kept

    class Stuck:
        """Memory that takes no write."""

        def write(self, values):
            pass

        def read(self):
            return old + 1

    shared.changed._kept = [(Stuck(), old)]
    with pytest.raises(FailedPrecondition, match="Restart vLLM"):
        shared.changed.put_back()
    shared.changed._kept = [(place, old)]
    shared.changed.put_back()
    assert shared.bytes() == shared.before
