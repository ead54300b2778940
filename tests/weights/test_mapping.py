"""Memory of another real process: mapped, written from both sides, and checked."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.region import Region
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_trainer.weights.live_view import LiveView
from apollo_trainer.weights.mapping import map_buffer, measure
from tests.waiting import HANG

# Shares 64 fp32 numbers 0..63; then, for each line it reads: "get I" or "set I VALUE".
OWNER = """
import mmap, os, struct, sys
fd = os.memfd_create("test")
os.ftruncate(fd, 256)
memory = mmap.mmap(fd, 256)
memory[:] = struct.pack("64f", *range(64))
print(os.getpid(), fd, os.fstat(fd).st_ino, flush=True)
for line in sys.stdin:
    order, index, *value = line.split()
    at = 4 * int(index)
    if order == "set":
        memory[at:at + 4] = struct.pack("f", float(value[0]))
    print(struct.unpack("f", memory[at:at + 4])[0], flush=True)
"""


class Owner:
    """The process that owns the memory, and its handle."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        pid, fd, inode = map(int, self.process.stdout.readline().split())
        self.handle = pb.MemfdHandle(pid=pid, fd=fd, inode=inode)

    def buffer(self, size=256, **changed):
        handle = pb.MemfdHandle()
        handle.CopyFrom(self.handle)
        for field, value in changed.items():
            setattr(handle, field, value)
        return pb.Buffer(buffer_id=0, size_bytes=size, memfd=handle)

    def ask(self, order):
        self.process.stdin.write(f"{order}\n")
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


def live(shape, stride, offset=0):
    return LiveView("w", torch.float32, Region.whole_of(shape), stride, 0, offset, "t")


def test_a_view_shows_the_owners_numbers(owner):
    mapping = map_buffer(owner.buffer())
    found = mapping.view(live((3, 4), (1, 3), offset=40))
    assert torch.equal(found, torch.arange(10.0, 22.0).view(4, 3).t())
    assert mapping.size_bytes == 256


def test_a_write_on_either_side_is_seen_on_the_other(owner):
    found = map_buffer(owner.buffer()).view(live((8, 8), (8, 1)))
    found[2, 3] = -5.0
    assert owner.ask("get 19") == -5.0
    assert owner.ask("set 63 7.5") == 7.5
    assert found[7, 7] == 7.5


def test_a_step_of_an_optimizer_lands_in_the_owners_memory(owner):
    found = map_buffer(owner.buffer()).view(live((4,), (1,), offset=16))
    parameter = torch.nn.Parameter(found)
    parameter.sum().backward()
    torch.optim.SGD([parameter], lr=0.5).step()
    assert [owner.ask(f"get {i}") for i in range(3, 9)] == [3.0, 3.5, 4.5, 5.5, 6.5, 8.0]


@pytest.mark.parametrize("changed", [{"inode": 1}, {"size": 128}, {"size": 512}, {"fd": 99}])
def test_memory_that_is_not_what_the_manifest_says_is_refused(owner, changed):
    with pytest.raises(FailedPrecondition) as error:
        map_buffer(owner.buffer(**changed))
    assert error.value.reason == "BUFFER_GONE"


def test_another_file_behind_the_same_descriptor_is_refused(owner):
    with pytest.raises(FailedPrecondition) as error:
        map_buffer(owner.buffer(fd=1))
    assert error.value.reason == "BUFFER_GONE"


def test_memory_of_a_process_that_ended_is_refused_without_its_path(owner):
    buffer = owner.buffer()
    owner.process.kill()
    owner.process.wait(HANG)
    with pytest.raises(FailedPrecondition) as error:
        map_buffer(buffer)
    assert error.value.reason == "BUFFER_GONE"
    assert "/proc" not in error.value.message


def test_what_is_mapped_outlives_its_owner(owner):
    found = map_buffer(owner.buffer()).view(live((64,), (1,)))
    owner.process.kill()
    owner.process.wait(HANG)
    assert torch.equal(found, torch.arange(64.0))


def test_measuring_tells_shared_parameters_from_copied_ones(owner):
    mapping = map_buffer(owner.buffer())
    shared, strided = (
        mapping.view(live((8,), (1,))),
        mapping.view(live((4, 2), (1, 4), offset=128)),
    )
    use = measure([shared, strided, shared.clone()], [mapping])
    assert (use.parameters, use.shared_bytes, use.copied_bytes) == (24, 64, 32)


def test_memory_of_another_file_counts_as_copied(owner):
    other = Owner()
    mapping, theirs = map_buffer(owner.buffer()), map_buffer(other.buffer())
    use = measure([theirs.view(live((8,), (1,)))], [mapping])
    assert (use.shared_bytes, use.copied_bytes) == (0, 32)
    other.end()


def shared_memory_open() -> int:
    """Descriptors of memory; others of this process come and go with what it collects."""
    targets = []
    for each in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            targets.append(str(each.readlink()))
    return sum("memfd:" in target for target in targets)


def test_no_descriptor_stays_open_after_mapping(owner):
    before = shared_memory_open()
    mappings = [map_buffer(owner.buffer()) for _ in range(5)]
    assert shared_memory_open() == before
    assert len({m.storage.data_ptr() for m in mappings}) == 5
