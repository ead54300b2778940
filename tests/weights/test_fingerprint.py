"""The digest of weights changes with any bit of them, and with nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_grpc.region import Region
from apollo_trainer.parallel.parts import part_of
from apollo_trainer.weights import fingerprint as module
from apollo_trainer.weights.fingerprint import BLOCK_WORDS, SAMPLED, fingerprint, sample

QUICK = settings(deadline=None, max_examples=25, derandomize=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Within a block, at its end, over it, and over what is taken at a time.
COUNTS = (1, 3, 4 * BLOCK_WORDS - 1, 4 * BLOCK_WORDS, 4 * BLOCK_WORDS + 1, 20 * BLOCK_WORDS + 7)


def weights(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)


@QUICK
@given(st.sampled_from(COUNTS), st.sampled_from(DTYPES), st.data())
def test_one_flipped_bit_changes_it(count, dtype, data):
    tensor = weights(count, dtype)
    before = fingerprint({"w": tensor})
    words = tensor.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    place = data.draw(st.integers(0, count - 1))
    words[place] ^= 1 << data.draw(st.integers(0, 8 * dtype.itemsize - 2))
    assert fingerprint({"w": tensor}) != before


@QUICK
@given(st.integers(0, 3 * BLOCK_WORDS), st.integers(0, 3 * BLOCK_WORDS))
def test_two_exchanged_values_change_it(a, b):
    tensor = weights(3 * BLOCK_WORDS + 1)
    before = fingerprint({"w": tensor})
    tensor[[a, b]] = tensor[[b, a]]
    assert (fingerprint({"w": tensor}) == before) == (a == b)


def test_zeros_of_both_signs_and_nan_payloads_differ():
    same_values = torch.tensor([0.0, -0.0, float("nan")])
    other_nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    digests = {fingerprint({"w": same_values[i : i + 1]}) for i in range(3)}
    assert len(digests | {fingerprint({"w": other_nan})}) == 4


def test_layout_in_memory_and_order_of_names_do_not_matter():
    square = weights(600).view(20, 30)
    turned = square.t().contiguous().t()
    assert turned.stride() != square.stride()
    one, two = {"a": square, "b": square[0]}, {"b": square[0].clone(), "a": turned}
    assert fingerprint(one) == fingerprint(two)


@pytest.mark.parametrize("start", range(5))
def test_where_a_tensor_begins_in_memory_does_not_matter(start):
    tensor = weights(1001, torch.bfloat16)
    moved = torch.zeros(start + 1001, dtype=torch.bfloat16)[start:]
    moved.copy_(tensor)
    assert fingerprint({"w": moved}) == fingerprint({"w": tensor})


def product(draw, root):
    """What two ranks have of a root: some indices of one dimension, the others in another order."""
    axis = draw(st.integers(0, len(root) - 1))
    orders = [draw(st.permutations(range(n))) for n in root]
    cut = draw(st.integers(1, root[axis] - 1))
    for part in (slice(0, cut), slice(cut, None)):
        kept = [order[part] if k == axis else order for k, order in enumerate(orders)]
        yield Region(root, tuple(tuple((i, 1) for i in indices) for indices in kept))


@QUICK
@given(st.sampled_from([(5, 7), (2, 9, 4), (3, 64), (11,)]), st.sampled_from(DTYPES), st.data())
def test_the_parts_of_two_ranks_add_up_to_the_digest_of_the_whole(root, dtype, data):
    whole = weights(math.prod(root), dtype).view(root)
    parts = list(product(data.draw, root))
    sums = [module._sum(part_of(whole, region), region) for region in parts]
    assert sum(sums) == module._sum(whole, Region.whole_of(root))


def test_long_lines_and_a_second_holder_count_once():
    root = (3, 2 * BLOCK_WORDS + 5)
    whole = weights(math.prod(root), torch.bfloat16).view(root)
    two = [Region(root, (((0, 1),), ((0, root[1]),))), Region(root, (((1, 2),), ((0, root[1]),)))]
    sums = [
        module._sum(part_of(whole, region), region) for region in (*two, replace(two[1], replica=1))
    ]
    assert sum(sums) == module._sum(whole, Region.whole_of(root))


def test_name_shape_and_dtype_matter():
    tensor = weights(12)
    others = ({"v": tensor}, {"w": tensor.view(3, 4)}, {"w": tensor.view(torch.bfloat16)})
    assert fingerprint({"w": tensor}) not in {fingerprint(other) for other in others}


@pytest.mark.parametrize("blocks", [1, 2, 128])
def test_how_much_is_taken_at_a_time_does_not_matter(blocks, monkeypatch):
    tensor = weights(5 * BLOCK_WORDS + 7)
    before = fingerprint({"w": tensor})
    monkeypatch.setattr(module, "_BLOCKS", {"cpu": blocks})
    assert fingerprint({"w": tensor}) == before


def test_the_weights_are_not_touched():
    tensor = weights(100)
    copy = tensor.clone()
    fingerprint({"w": tensor})
    assert torch.equal(tensor, copy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_the_same(dtype):
    tensor = weights(200 * BLOCK_WORDS + 7, dtype)
    assert fingerprint({"w": tensor}) == fingerprint({"w": tensor.cuda()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (64, 1024), (1000, 333)])
def test_a_sample_is_of_every_parameter_and_changes_with_all_of_it(dtype, shape):
    parameters = {
        "a": torch.ones(7, dtype=dtype),
        "b": torch.zeros(shape, dtype=dtype).transpose(0, -1),
    }
    before = sample(parameters)
    assert torch.equal(before, sample(parameters))
    assert before.numel() <= 2 * (SAMPLED + 1) * dtype.itemsize
    for name in parameters:
        changed = parameters | {name: parameters[name] + 1}
        assert not torch.equal(before, sample(changed))


def test_a_sample_meets_a_fiftieth_of_the_columns_and_rows_of_a_matrix():
    matrix = torch.zeros(1024, 1024)
    before = sample({"w": matrix})
    for turned in (matrix, matrix.t()):
        turned[:, ::50] = 1.0
        assert not torch.equal(before, sample({"w": matrix}))
        turned.zero_()
