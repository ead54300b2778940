"""A part of a GPU: steps beside a vLLM that decodes leave it the other multiprocessors."""

from contextlib import nullcontext

import pytest
import torch

from apollo_trainer.optim import Apollo
from apollo_trainer.training.captured import CapturedPasses
from apollo_trainer.training.device_part import DevicePart, part_of
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import take_step

DAEMON = {"CUDA_MPS_PIPE_DIRECTORY": "somewhere"}
DEVICE = torch.device("cuda", 0)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")
PROGRAMS = 4096
SAMPLE = TokenizedSample((3, 50, 7, 99), (140, 2, 77, 30))


def places(seen):
    """Has each of many programs write the multiprocessor that it runs on."""
    from tests.training.multiprocessors import write_place

    write_place[(PROGRAMS,)](seen)


@pytest.fixture(scope="module")
def part():
    return DevicePart(DEVICE, 25)


@pytest.fixture
def most():
    have = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    return -(-have * 25 // 100 // 8) * 8


def test_nothing_is_divided_without_a_daemon_or_where_all_is_asked_for():
    assert part_of(DEVICE, 25, {}) is None
    assert part_of(DEVICE, 100, DAEMON) is None


@on_gpu
def test_kernels_run_on_the_part_within_it_and_on_all_after_it(part, most):
    seen = torch.zeros(PROGRAMS, dtype=torch.int32, device=DEVICE)
    places(seen)
    everywhere = len(seen.unique())
    with part.running():
        assert part.entered
        places(seen)
    assert not part.entered
    assert len(seen.unique()) <= most < everywhere
    places(seen)
    assert len(seen.unique()) == everywhere


@on_gpu
def test_a_graph_of_the_part_runs_there_wherever_it_is_replayed(part, most):
    seen = torch.zeros(PROGRAMS, dtype=torch.int32, device=DEVICE)
    places(seen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=part.stream):
        places(seen)
    seen.zero_()
    graph.replay()
    assert len(seen.unique()) <= most


@on_gpu
def test_what_is_launched_before_and_after_it_is_waited_for(part):
    """In order over three places, many times: each adds to what the one before left."""
    sums = torch.zeros(1 << 22, device=DEVICE)
    for _ in range(50):
        sums += 1
        with part.running():
            sums *= 2
            sums += 1
        sums -= 3
        with part.running():
            sums.div_(2)
    # x -> (2 (x + 1) + 1 - 3) / 2 = x
    assert sums.eq(0).all()


@on_gpu
def test_steps_on_the_part_and_on_all_lose_what_they_lose_without(make_model, part):
    losses = []
    for passes_of in (lambda model: None, lambda model: CapturedPasses(model, part)):
        model = make_model("qwen3").to(DEVICE)
        passes, optimizer = passes_of(model), Apollo(model.named_parameters(), rank=8, lr=1e-3)
        turns = [nullcontext, part.running if passes is not None else nullcontext]
        found = []
        for number in range(40):
            with turns[number // 4 % 2]():
                found.append(take_step(model, optimizer, [SAMPLE], passes=passes).loss)
        losses.append(found)
    assert len(passes) == 2 and not passes.refusal
    assert losses[1] == pytest.approx(losses[0], rel=0.02, abs=0.01)
    assert losses[1][-1] < losses[1][0]
