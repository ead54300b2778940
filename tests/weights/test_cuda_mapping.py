"""Weights that another process holds on the GPU: opened by CUDA IPC, read and written in place."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.region import Region
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_trainer.weights.live_view import LiveView
from apollo_trainer.weights.mapping import map_buffer, map_buffers, measure
from tests.waiting import HANG

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MEGABYTE = 1 << 20

# Exports a module's weights as the sidecar does; for each line it reads it prints a sum.
OWNER = """
import sys, torch
from apollo_sidecar.cuda_weights import CudaWeights
module = torch.nn.Module()
module.first = torch.nn.Parameter(torch.arange(1 << 22, device="cuda", dtype=torch.float32))
module.slice = torch.nn.Parameter(torch.arange(4096, device="cuda").bfloat16().view(64, 64)[8:24])
module.tied = module.first
live = CudaWeights(module)
assert live.manifest() == live.manifest()
print(live.manifest().SerializeToString().hex(), flush=True)
for line in sys.stdin:
    torch.cuda.synchronize()
    print(getattr(module, line.strip()).double().sum().item(), flush=True)
"""


class Owner:
    """The process whose GPU memory it is, and its manifest."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        read = bytes.fromhex(self.process.stdout.readline())
        self.manifest = pb.WeightManifest.FromString(read)

    def view(self, mappings, name):
        tensor = next(t for t in self.manifest.tensors if t.name == name)
        live = LiveView(
            name,
            getattr(torch, tensor.dtype),
            Region.whole_of(tensor.shape),
            tuple(tensor.stride),
            tensor.buffer_id,
            tensor.offset_bytes,
            name,
        )
        return mappings[tensor.buffer_id].view(live)

    def sum(self, name):
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self):
        self.process.stdin.close()
        self.process.wait(HANG)
        self.process.stdout.close()


@pytest.fixture
def owner():
    process = Owner()
    yield process
    process.end()


def test_views_show_the_owners_numbers(owner):
    mappings = map_buffers(owner.manifest.buffers)
    first, part = owner.view(mappings, "first"), owner.view(mappings, "slice")
    assert torch.equal(first, torch.arange(1 << 22, device="cuda", dtype=torch.float32))
    whole = torch.arange(4096, device="cuda").bfloat16().view(64, 64)
    assert torch.equal(part, whole[8:24])


def test_a_write_is_what_the_owner_computes_with(owner):
    mappings = map_buffers(owner.manifest.buffers)
    owner.view(mappings, "first").fill_(0.5)
    torch.cuda.synchronize()
    assert owner.sum("first") == owner.sum("tied") == (1 << 22) / 2


def test_tied_weights_share_one_buffer_and_one_alias_group(owner):
    entries = {tensor.name: tensor for tensor in owner.manifest.tensors}
    assert entries["first"].alias_group == entries["tied"].alias_group
    assert entries["first"].alias_group != entries["slice"].alias_group
    assert len(owner.manifest.buffers) == 2


def test_opening_takes_no_memory_of_the_device(owner):
    torch.ones(1, device="cuda")
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    mappings = map_buffers(owner.manifest.buffers)
    after, _ = torch.cuda.mem_get_info()
    assert sum(mapping.size_bytes for mapping in mappings.values()) > 16 * MEGABYTE
    assert before - after < 16 * MEGABYTE


def test_only_what_was_opened_counts_as_shared(owner):
    mappings = map_buffers(owner.manifest.buffers)
    parameter = owner.view(mappings, "first")
    found = measure([parameter, parameter.clone()], mappings.values())
    assert found.shared_bytes == found.copied_bytes == 4 << 22


def test_a_gpu_that_is_not_here_is_refused_by_name(owner):
    buffer = owner.manifest.buffers[0]
    buffer.cuda_ipc.device_uuid = "00000000-0000-0000-0000-000000000000"
    with pytest.raises(FailedPrecondition, match="CUDA_VISIBLE_DEVICES") as caught:
        map_buffer(buffer)
    assert caught.value.reason == "DEVICE_NOT_VISIBLE"


def test_memory_of_a_process_that_has_ended_is_refused(owner):
    owner.end()
    with pytest.raises(FailedPrecondition) as caught:
        map_buffers(owner.manifest.buffers)
    assert caught.value.reason == "BUFFER_GONE"
