"""Calls that change weights are counted where a training server reads, and refused beside it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.generation import SharedGeneration
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar import worker as worker_module
from apollo_sidecar.generation import GenerationPage
from apollo_sidecar.memfd_weights import MemfdWeights
from apollo_sidecar.other_writers import CHANGES_WEIGHTS, EXPORT, HELD


def vllm_classes():
    """WorkerBase and WorkerWrapperBase of vllm/v1/worker/worker_base.py, as far as they matter."""

    class WorkerBase:
        device = None

        def __init__(self):
            self.done = []

        def execute_model(self, scheduler_output):
            """A forward pass, which changes nothing."""

        def list_loras(self):
            return set()

        def load_model(self):
            """Called by the wrapper's."""

    class WorkerWrapperBase:
        def __init__(self):
            self.worker = WorkerBase()

        def __getattr__(self, name):
            return getattr(self.worker, name)

        def execute_model(self, scheduler_output):
            return self.worker.execute_model(scheduler_output)

    def method(name):
        def call(self, *args, **kwargs):
            self.done.append((name, args, kwargs))
            return name

        call.__name__ = name
        return call

    for name in CHANGES_WEIGHTS:
        setattr(WorkerBase, name, method(name))
    return SimpleNamespace(WorkerBase=WorkerBase, WorkerWrapperBase=WorkerWrapperBase)


@pytest.fixture
def wrapper():
    classes = vllm_classes()
    worker_module.install(classes)
    worker_module.install(classes)
    wrapper = classes.WorkerWrapperBase()
    setattr(wrapper.worker, EXPORT, MemfdWeights(torch.nn.Linear(2, 2)))
    return wrapper


def shared(wrapper):
    manifest = getattr(wrapper.worker, EXPORT).manifest()
    assert manifest.generation == 1
    return SharedGeneration(manifest.generation_page)


@pytest.mark.parametrize("name", sorted(CHANGES_WEIGHTS))
def test_each_is_told_before_it_changes_anything(wrapper, name):
    generation, seen = shared(wrapper), []
    wrapper.worker.done = SimpleNamespace(append=lambda call: seen.append((call, generation.now)))
    assert getattr(wrapper, name)(1, tag="weights") == name
    assert seen == [((name, (1,), {"tag": "weights"}), 2)]
    assert getattr(wrapper.worker, EXPORT).manifest().generation == 2


def test_what_changes_nothing_is_not_counted(wrapper):
    generation = shared(wrapper)
    wrapper.execute_model(SimpleNamespace(scheduled_new_reqs=[]))
    assert wrapper.list_loras() == set()
    assert generation.now == 1


@pytest.mark.parametrize("name", sorted(CHANGES_WEIGHTS))
def test_each_is_refused_while_a_training_server_may_write(wrapper, name):
    generation = shared(wrapper)
    assert wrapper.apollo_hold() == ("", "", b"")
    with pytest.raises(RuntimeError, match=f"apollo: {name} is refused while a training run"):
        getattr(wrapper, name)()
    assert (wrapper.worker.done, generation.now) == ([], 1)
    wrapper.apollo_let_go()
    getattr(wrapper, name)()
    assert generation.now == 2


def test_a_lease_that_finds_one_of_an_ended_api_server_is_told_so(wrapper):
    wrapper.apollo_hold()
    assert wrapper.apollo_hold() == ("", "", HELD)
    wrapper.apollo_let_go()
    assert wrapper.apollo_hold() == ("", "", b"")


def test_a_worker_that_shares_nothing_does_as_it_is_told():
    classes = vllm_classes()
    worker_module.install(classes)
    wrapper = classes.WorkerWrapperBase()
    assert wrapper.reload_weights() == "reload_weights"


def test_what_a_release_of_vllm_does_not_have_is_not_made_up(wrapper):
    del type(wrapper.worker).reset_weights
    with pytest.raises(AttributeError):
        _ = wrapper.reset_weights


READ = """
import sys
from apollo_grpc.generation import SharedGeneration
from apollo_grpc.sidecar.v1.weight_export_pb2 import MemfdHandle
print(SharedGeneration(MemfdHandle.FromString(bytes.fromhex(sys.argv[1]))).now)
"""


def test_another_process_reads_it_and_none_of_what_is_gone():
    page = GenerationPage()
    page.advance()
    command = [sys.executable, "-c", READ, page.handle().SerializeToString().hex()]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"2\n"
    handle = page.handle()
    for field, wrong in (("inode", handle.inode + 1), ("fd", 9999), ("pid", 2**22 + 1)):
        gone = pb.MemfdHandle()
        gone.CopyFrom(handle)
        setattr(gone, field, wrong)
        with pytest.raises(FailedPrecondition, match="cannot be opened") as error:
            SharedGeneration(gone)
        assert error.value.reason == "BUFFER_GONE"
