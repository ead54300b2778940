"""A map that could write outside a parameter's own bytes is refused, with its reason."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import weight_export_pb2 as pb
from apollo_trainer.weights.manifest import MAX_ELEMENTS, check_manifest, check_views

QUICK = settings(deadline=None, max_examples=150, derandomize=True)
SIZE = 4096
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def view(name="w", shape=(2, 3), stride=(3, 1), offset=0, dtype="float32", buffer_id=0):
    return pb.ParameterView(
        name=name,
        shape=shape,
        stride=stride,
        offset_bytes=offset,
        dtype=dtype,
        buffer_id=buffer_id,
        tensor="t",
    )


def refused(views, expected=None, sizes=None):
    expected = expected or {v.name: tuple(v.shape) for v in views}
    with pytest.raises(FailedPrecondition) as error:
        check_views(views, sizes or {0: SIZE}, expected)
    assert "Nothing was written." in error.value.message
    return error.value.reason


def checked(views):
    return check_views(views, {0: SIZE}, {v.name: tuple(v.shape) for v in views})


def addresses(found):
    """Every byte that the views touch, one entry an element and byte."""
    for live in found.values():
        for index in itertools.product(*map(range, live.shape)):
            at = sum(i * s for i, s in zip(index, live.stride, strict=True))
            first = live.offset_bytes + at * live.dtype.itemsize
            yield from range(first, first + live.dtype.itemsize)


@st.composite
def views(draw, name="w"):
    """Any view at all: most are wrong in some way."""
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
    stride = draw(
        st.lists(st.integers(-1, 30), min_size=len(shape), max_size=len(shape))
        | st.just([math.prod(shape[k + 1 :]) for k in range(len(shape))])
    )
    dtype = draw(st.sampled_from(sorted(WIDTH)))
    return view(name, shape, stride, draw(st.integers(-8, 300)), dtype)


@QUICK
@given(st.tuples(views("a"), views("b")), st.integers(1, 400))
def test_what_passes_touches_each_byte_once_and_stays_inside(pair, size):
    expected = {v.name: tuple(v.shape) for v in pair}
    try:
        found = check_views(list(pair), {0: size}, expected)
    except FailedPrecondition:
        return
    touched = list(addresses(found))
    assert len(touched) == len(set(touched))
    assert min(touched) >= 0
    assert max(touched) < size


@QUICK
@given(st.permutations(range(3)), st.sampled_from(sorted(WIDTH)), st.integers(0, 50))
def test_contiguous_views_in_any_order_of_dimensions_pass(order, dtype, start):
    shape, stride, reach = (2, 3, 4), [0, 0, 0], 1
    for k in order:
        stride[k], reach = reach, reach * shape[k]
    found = checked([view(shape=shape, stride=stride, offset=start * WIDTH[dtype], dtype=dtype)])
    assert found["w"].numel == 24
    assert found["w"].dtype is getattr(torch, dtype)
    assert found["w"].end_bytes == (start + 24) * WIDTH[dtype]


@QUICK
@given(st.sampled_from(sorted(WIDTH)), st.integers(1, 60), st.integers(1, 15))
def test_a_view_that_ends_one_element_late_is_out_of_bounds(dtype, rows, columns):
    width, count = WIDTH[dtype], rows * columns
    last = SIZE - count * width
    exact = view(shape=(rows, columns), stride=(columns, 1), offset=last, dtype=dtype)
    checked([exact])
    exact.offset_bytes += width
    assert refused([exact]) == "MAP_OUT_OF_BOUNDS"


@pytest.mark.parametrize("offset", [-4, 1, 2, 3, SIZE, 2**62])
def test_an_offset_outside_or_between_elements_is_out_of_bounds(offset):
    assert refused([view(offset=offset)]) == "MAP_OUT_OF_BOUNDS"


def test_a_buffer_that_does_not_exist_is_out_of_bounds():
    assert refused([view(buffer_id=7)]) == "MAP_OUT_OF_BOUNDS"


def test_strides_that_reach_outside_are_out_of_bounds():
    assert refused([view(stride=(2000, 1))]) == "MAP_OUT_OF_BOUNDS"


@pytest.mark.parametrize("stride", [(-3, 1), (3, -1), (MAX_ELEMENTS, 1), (2**62, 2**62)])
def test_strides_backwards_or_beyond_any_memory_are_refused(stride):
    assert refused([view(stride=stride)]) == "MAP_INVALID"


@pytest.mark.parametrize("shape", [(0, 3), (2**24, 2**24, 2**24)])
def test_sizes_of_no_parameter_are_refused(shape):
    assert refused([view(shape=shape, stride=(1,) * len(shape))]) == "MAP_INVALID"


@pytest.mark.parametrize("stride", [(0, 1), (1, 1), (2, 1), (1, 0), (0, 0), (4, 2)])
def test_elements_that_share_an_address_are_refused(stride):
    shape = (3, 3)
    assert refused([view(shape=shape, stride=stride)]) == "MAP_OVERLAPS"


def test_a_stride_of_a_dimension_of_one_means_nothing():
    assert checked([view(shape=(1, 3), stride=(0, 1))])["w"].end_bytes == 12


@QUICK
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 20), st.integers(1, 20))
def test_two_parameters_pass_exactly_when_they_are_apart(a, b, m, n):
    pair = [view("a", (m,), (1,), 4 * a), view("b", (n,), (1,), 4 * b)]
    if a + m <= b or b + n <= a:
        assert checked(pair).keys() == {"a", "b"}
    else:
        assert refused(pair) == "MAP_OVERLAPS"


def test_the_same_offset_in_two_buffers_is_apart():
    pair = [view("a", buffer_id=0), view("b", buffer_id=1)]
    expected = {"a": (2, 3), "b": (2, 3)}
    assert len(check_views(pair, {0: SIZE, 1: SIZE}, expected)) == 2


def test_a_parameter_inside_a_larger_one_overlaps_though_others_lie_between():
    three = [view("a", (100,), (1,), 0), view("b", (2,), (1,), 400), view("c", (2,), (1,), 40)]
    assert refused(three) == "MAP_OVERLAPS"


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float64", "torch.float32", ""])
def test_a_dtype_that_cannot_be_trained_is_refused(dtype):
    assert refused([view(dtype=dtype)]) == "DTYPE_UNSUPPORTED"


@pytest.mark.parametrize("expected", [{"w": (3, 2)}, {"w": (6,)}, {"v": (2, 3)}])
def test_a_shape_or_name_of_another_model_is_refused(expected):
    assert refused([view()], expected) == "MAP_INVALID"


def test_strides_for_other_dimensions_are_refused():
    assert refused([view(stride=(1,))]) == "MAP_INVALID"


def test_a_parameter_that_is_mapped_twice_or_never_is_refused_by_name():
    assert refused([view(), view(offset=400)]) == "MAP_INVALID"
    assert refused([view()], {"w": (2, 3), "v": (2,)}) == "PARAMETER_UNMAPPED"


def good_manifest():
    manifest = pb.WeightManifest(epoch="e", tensor_parallel_size=1)
    manifest.buffers.add(buffer_id=0, size_bytes=4, memfd=pb.MemfdHandle(pid=1, fd=3, inode=9))
    return manifest


def another_buffer(manifest, **buffer):
    manifest.buffers.add(**({"buffer_id": 1, "size_bytes": 4, "memfd": pb.MemfdHandle()} | buffer))


BAD_MANIFESTS = [
    (lambda m: m.ClearField("epoch"), "MANIFEST_INVALID"),
    (lambda m: m.ClearField("buffers"), "MANIFEST_INVALID"),
    (lambda m: another_buffer(m, buffer_id=0), "MANIFEST_INVALID"),
    (lambda m: another_buffer(m, size_bytes=0), "MANIFEST_INVALID"),
    (lambda m: another_buffer(m, size_bytes=-4), "MANIFEST_INVALID"),
    (lambda m: another_buffer(m, memfd=None), "BUFFER_UNSUPPORTED"),
    (
        lambda m: another_buffer(m, memfd=None, cuda_ipc=pb.CudaIpcHandle(handle=b"x")),
        "BUFFER_UNSUPPORTED",
    ),
    (lambda m: setattr(m, "tensor_parallel_size", 2), "TENSOR_PARALLEL_UNSUPPORTED"),
    (lambda m: m.ClearField("tensor_parallel_size"), "TENSOR_PARALLEL_UNSUPPORTED"),
]


@pytest.mark.parametrize("number", range(len(BAD_MANIFESTS)))
def test_a_manifest_that_cannot_be_mapped_is_refused(number):
    spoil, reason = BAD_MANIFESTS[number]
    manifest = good_manifest()
    check_manifest(manifest)
    spoil(manifest)
    with pytest.raises(FailedPrecondition) as error:
        check_manifest(manifest)
    assert error.value.reason == reason
