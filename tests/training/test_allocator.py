"""The allocator that is followed: what torch's own reserves for the same tensors."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_trainer.training.allocator import Allocations, CachingAllocator

MIB = 2**20
SIZES = st.one_of(st.integers(1, 2 * MIB), st.integers(1, 64 * MIB))


@pytest.mark.parametrize(
    ("asked", "reserved"),
    [(1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB)],
)
def test_a_first_tensor_takes_a_segment(asked: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.take(asked)
    assert allocator.reserved == reserved


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(SIZES, st.booleans()), max_size=60), st.randoms(use_true_random=False))
def test_pieces_in_use_never_overlap_and_all_comes_back(
    asked: list[tuple[int, bool]], draw: random.Random
) -> None:
    allocator = CachingAllocator()
    held: list = []
    for size, gives in asked:
        held.append(allocator.take(size))
        assert held[-1].size >= size
        if gives:
            allocator.give(held.pop(draw.randrange(len(held))))
    spans = sorted((block.at, block.at + block.size) for block in held)
    ends = [0, *(end for _, end in spans)]
    assert all(end <= begin for end, (begin, _) in zip(ends, spans, strict=False))
    assert ends[-1] <= allocator.reserved
    for block in held:
        allocator.give(block)
    reserved = allocator.reserved
    for size, _ in asked[:1]:
        allocator.take(size)
    assert allocator.reserved == reserved


def test_views_and_writes_in_place_take_nothing_and_what_is_let_go_of_is_used_again() -> None:
    allocator = CachingAllocator()
    with Allocations(allocator, "cpu") as seen:
        tensor = torch.zeros(1000, 1000)
        part = tensor[10:].mT
        part += 1
        del tensor
        assert (seen.live, seen.made) == (4_000_000, 1)
        again = part * 2
        assert seen.live == seen.peak == 4_000_000 + again.nbytes
        del part, again
        assert seen.live == 0
        torch.empty(3_000_000, dtype=torch.uint8)
    assert allocator.reserved == 20 * MIB


def test_tensors_without_memory_count_as_those_with_it() -> None:
    peaks = []
    for device in ("cpu", "meta"):
        with Allocations(CachingAllocator(), device) as seen:
            weight = torch.empty(64, 64, device=device, requires_grad=True)
            ((torch.empty(32, 64, device=device) @ weight).tanh() ** 2).sum().backward()
        peaks.append((seen.peak, seen.live))
    assert peaks[0] == peaks[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_reserves_what_is_told() -> None:
    draw, pool, held = random.Random(5), torch.cuda.MemPool(), []
    allocator = CachingAllocator()
    before = torch.cuda.memory_reserved()
    with torch.cuda.use_mem_pool(pool), Allocations(allocator, "cuda"):
        for step in range(400):
            size = draw.choice((300, 5_000, 700_000, 3 * MIB, 9 * MIB, 30 * MIB))
            held.append(
                torch.empty(draw.randint(size // 2, size), dtype=torch.uint8, device="cuda")
            )
            if len(held) > 20:
                held.pop(draw.randrange(len(held)))
            told, real = allocator.reserved, torch.cuda.memory_reserved() - before
            assert told == real, f"after {step + 1} tensors {told} are told and {real} reserved"
    held.clear()
