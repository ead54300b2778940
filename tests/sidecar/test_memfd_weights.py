"""The weights move into shared memory that no one can shrink, and nothing else changes."""

from __future__ import annotations

import fcntl
import mmap
import os
from itertools import pairwise

import pytest
import torch
from torch import nn

from apollo_grpc.errors import FailedPrecondition
from apollo_sidecar.memfd_weights import ALIGNMENT_BYTES, MemfdWeights


class Small(nn.Module):
    """Two dtypes, a transposed view, a slice of a larger storage, a buffer and tied weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)
        self.low = nn.Parameter(torch.randn(5, 3).bfloat16())
        self.turned = nn.Parameter(torch.randn(5, 5).t())
        self.slice = nn.Parameter(torch.randn(9, 5)[2:7])
        self.register_buffer("scale", torch.full((5,), 0.5))
        self.empty = nn.Parameter(torch.empty(0))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.norm(self.embed(ids) * self.scale) @ self.turned @ self.slice
        return self.head(x), x.bfloat16() @ self.low


IDS = torch.tensor([[0, 3, 6, 1]])


@pytest.fixture
def module():
    return Small()


def tensors_of(module):
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    return {name: tensor for name, tensor in named if tensor.numel()}


def memfd_of(live):
    return live.manifest().buffers[0].memfd.fd


def test_every_value_survives_the_move_and_keeps_its_parameter(module):
    before = {
        name: (tensor, tensor.clone(), tensor.stride())
        for name, tensor in tensors_of(module).items()
    }
    MemfdWeights(module)
    after = tensors_of(module)
    assert after.keys() == before.keys()
    for name, (same, values, stride) in before.items():
        assert after[name] is same
        assert torch.equal(after[name], values)
        assert after[name].stride() == stride


def test_the_module_still_computes_the_same(module):
    before = module(IDS)
    MemfdWeights(module)
    for ours, theirs in zip(module(IDS), before, strict=True):
        assert torch.equal(ours, theirs)


def test_every_tensor_lies_in_the_shared_memory(module):
    live = MemfdWeights(module)
    start = live.storages[0].data_ptr()
    for tensor in tensors_of(module).values():
        assert tensor.untyped_storage()._cdata == live.storages[0]._cdata
        assert start <= tensor.data_ptr() < start + live.size_bytes


def test_a_write_to_the_file_is_what_the_module_computes_with(module):
    live = MemfdWeights(module)
    entry = next(t for t in live.manifest().tensors if t.name == "scale")
    with mmap.mmap(memfd_of(live), live.size_bytes) as memory:
        memory[entry.offset_bytes : entry.offset_bytes + 20] = torch.zeros(5).numpy().tobytes()
    assert torch.equal(module.scale, torch.zeros(5))


def test_tied_weights_stay_tied_and_share_an_alias_group(module):
    live = MemfdWeights(module)
    module.embed.weight.data[0, 0] = 42.0
    assert module.head.weight[0, 0] == 42.0
    groups = {tensor.name: tensor.alias_group for tensor in live.manifest().tensors}
    assert groups["embed.weight"] == groups["head.weight"]
    assert len(set(groups.values())) == len(groups) - 1


def test_two_views_of_one_storage_stay_one_memory():
    module = nn.Module()
    whole = torch.arange(12.0)
    module.first, module.second = nn.Parameter(whole[:8]), nn.Parameter(whole[4:])
    MemfdWeights(module)
    module.first.data[4] = -1.0
    assert module.second[0] == -1.0
    assert torch.equal(module.second[1:], torch.arange(5.0, 12.0))


def test_the_memory_can_neither_shrink_nor_grow(module):
    live = MemfdWeights(module)
    fd = memfd_of(live)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    for size in (0, live.size_bytes - 1, live.size_bytes + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    assert os.fstat(fd).st_size == live.size_bytes


def test_the_memory_is_not_inherited_by_programs_that_are_started(module):
    assert not os.get_inheritable(memfd_of(MemfdWeights(module)))


def test_the_manifest_describes_the_memory(module):
    live = MemfdWeights(module)
    manifest, tensors = live.manifest(), tensors_of(module)
    (buffer,) = manifest.buffers
    assert (buffer.memfd.pid, buffer.memfd.inode) == (os.getpid(), os.fstat(memfd_of(live)).st_ino)
    assert {t.name for t in manifest.tensors} == tensors.keys()
    for described in manifest.tensors:
        dtype = getattr(torch, described.dtype)
        offset = described.offset_bytes // dtype.itemsize
        shape, stride = tuple(described.shape), tuple(described.stride)
        found = torch.empty(0, dtype=dtype).set_(live.storages[0], offset, shape, stride)
        assert torch.equal(found, tensors[described.name])
        assert found.data_ptr() == tensors[described.name].data_ptr()


def test_storages_are_aligned_and_apart(module):
    live = MemfdWeights(module)
    spans = sorted({(t.offset_bytes, t.end_bytes) for t in live.tensors})
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= live.size_bytes
    by_name = {t.name: t for t in live.tensors}
    assert by_name["slice"].offset_bytes % ALIGNMENT_BYTES == 2 * 5 * 4
    assert by_name["low"].offset_bytes % ALIGNMENT_BYTES == 0
    assert live.size_bytes % ALIGNMENT_BYTES == 0


def test_a_weight_that_moved_after_it_was_shared_is_refused_by_name(module):
    live = MemfdWeights(module)
    live.require_unmoved(module)
    module.low.data = module.low.data.clone()
    with pytest.raises(FailedPrecondition, match="the weight low") as error:
        live.require_unmoved(module)
    assert error.value.reason == "WEIGHTS_MOVED"


def test_tensors_that_share_memory_are_one_alias_group(module):
    module.register_buffer("rows", module.slice.detach()[1:3])
    group = {t.name: t.alias_group for t in MemfdWeights(module).manifest().tensors}
    assert group["head.weight"] == group["embed.weight"]
    assert group["rows"] == group["slice"]
    assert len(set(group.values())) == len(group) - 2
