"""Host memory is what was asked for, and a buffer is nobody's but its taker's."""

from __future__ import annotations

import pytest
import torch

from apollo_trainer.checkpoints.host_memory import HostBuffers, empty_like_host


@pytest.mark.parametrize("shape", [(), (3,), (0, 5), (2, 3, 4), (2**22,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_fresh_memory_has_the_shape_and_can_be_written(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    memory = empty_like_host(torch.empty(shape, dtype=dtype, device="meta"))
    assert (tuple(memory.shape), memory.dtype, memory.is_contiguous()) == (shape, dtype, True)
    memory.fill_(1)
    assert bool((memory == 1).all())


def test_a_buffer_is_used_again_once_it_was_given_back() -> None:
    buffers, like = HostBuffers(), torch.zeros(4, 6).T
    first, second = buffers.take(like), buffers.take(like)
    assert first.shape == like.shape
    assert first.is_contiguous()
    assert first.data_ptr() != second.data_ptr()
    buffers.give(first)
    assert buffers.take(torch.zeros(4, 6)).data_ptr() != first.data_ptr()
    assert buffers.take(like) is first
    buffers.give(second)
    buffers.clear()
    assert buffers.take(like) is not second


def test_what_is_not_kept_is_fresh_each_time() -> None:
    buffers, like = HostBuffers(keeps=False), torch.zeros(4, 6)
    first = buffers.take(like)
    buffers.give(first)
    assert buffers.take(like) is not first


def test_no_more_is_kept_than_the_last_copy_took() -> None:
    buffers, old, new = HostBuffers(), torch.zeros(4, 6), torch.zeros(3, 5)
    first = [buffers.take(old) for _ in range(3)]
    buffers.keep_only(*first)
    held = buffers.take(old)
    second = [buffers.take(new) for _ in range(2)]
    buffers.keep_only(*second)
    # Of another shape since, and never asked for again.
    assert all(buffers.take(old) is not each for each in first)
    assert {id(buffers.take(new)) for _ in range(2)} == {id(each) for each in second}
    assert held is not None
