"""A map that could write outside a parameter's own bytes is refused, with its reason."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_trainer.weights.live_view import check_views, views_of_others
from apollo_trainer.weights.manifest import (
    MAX_ELEMENTS,
    Span,
    check_manifest,
    named,
    shortened,
)

QUICK = settings(deadline=None, max_examples=150, derandomize=True)
SIZE = 4096
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def view(name="w", shape=(2, 3), stride=(3, 1), offset=0, dtype="float32", buffer_id=0, rank=0):
    return pb.ParameterView(
        name=name,
        shape=shape,
        stride=stride,
        offset_bytes=offset,
        dtype=dtype,
        buffer_id=buffer_id,
        tensor="t",
        rank=rank,
    )


def in_order(found, rows):
    """A view whose rows are these of the parameter."""
    found.runs.add(starts=rows, counts=[1] * len(rows))
    for size in found.shape[1:]:
        found.runs.add(starts=[0], counts=[size])
    return found


def whole(size, buffers=(0,)):
    """One tensor a buffer, that fills it; `t` is the first one's name."""
    names = ["t", "u", "v"]
    return {n: Span(b, 0, size, b) for n, b in zip(names, buffers, strict=False)}


def refused(views, expected=None, regions=None):
    expected = expected or {v.name: tuple(v.shape) for v in views}
    with pytest.raises(FailedPrecondition) as error:
        check_views(views, regions or whole(SIZE), expected)
    assert "Nothing was written." in error.value.message
    return error.value.reason


def checked(views):
    return check_views(views, whole(SIZE), {v.name: tuple(v.shape) for v in views})


def addresses(found):
    """Every byte that the views touch, one entry an element and byte."""
    for live in found.values():
        for index in itertools.product(*map(range, live.shape)):
            at = sum(i * s for i, s in zip(index, live.stride, strict=True))
            first = live.offset_bytes + at * live.dtype.itemsize
            yield from range(first, first + live.dtype.itemsize)


@pytest.mark.parametrize("rows", [[1, 0], [0, 1]])
def test_rows_in_another_order_are_kept_with_the_view(rows):
    live = checked([in_order(view(), rows)])["w"]
    assert live.region.indices(0) == rows
    assert live.region.whole == (rows == [0, 1])
    assert checked([view()])["w"].region.whole


@pytest.mark.parametrize("rows", [[0], [0, 0], [0, 2], [1, 0, 2], [-1, 0]])
def test_rows_that_are_no_order_of_the_parameters_are_refused(rows):
    assert refused([in_order(view(), rows)], {"w": (2, 3)}) == "MAP_INVALID"


def test_a_scalar_has_no_rows():
    assert refused([in_order(view(shape=(), stride=()), [0])]) == "MAP_INVALID"


def test_an_older_sidecars_order_of_rows_is_not_read_past():
    found = view()
    found.rows.extend([1, 0])
    assert refused([found]) == "MAP_INVALID"


def of_ranks(*parts):
    """A parameter [4, 3] in order of its rows, some of them on each rank."""
    return [
        in_order(view(shape=(len(rows), 3), rank=rank), rows) for rank, rows in enumerate(parts)
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_part_once_all_together_have_everything(rank):
    parts = of_ranks([0, 1, 2], [3])
    live = check_views(parts, whole(SIZE), {"w": (4, 3)}, rank, 2)["w"]
    assert live.region.indices(0) == [[0, 1, 2], [3]][rank]
    assert (live.shape, live.region.counted) == (((3, 3), (1, 3))[rank], True)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_views_are_theirs_alone_and_of_no_rank_that_there_is_not(rank):
    parts = [*of_ranks([0, 1, 2], [3]), view("w", rank=7), view("w", rank=-1)]
    parts[2:] = [in_order(each, [0, 1]) for each in parts[2:]]
    (other,) = views_of_others(parts, {"w": (4, 3)}, rank, 2)
    assert other.rank == 1 - rank
    assert other.region.indices(0) == [[3], [0, 1, 2]][rank]


def test_what_all_ranks_have_is_counted_on_the_first():
    parts = of_ranks([0, 1, 2, 3], [0, 1, 2, 3])
    live = [check_views(parts, whole(SIZE), {"w": (4, 3)}, rank, 2)["w"] for rank in (0, 1)]
    assert [each.region.counted for each in live] == [True, False]


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (([0, 1], [2]), "only 9 of its 12 elements"),
        (([0, 1, 2], [2, 3]), "overlap"),
        (([0, 1, 2, 3], [2, 3]), "overlap"),
        (([0, 1], [2, 3], [2, 3]), "more ranks than others"),
    ],
)
def test_parts_that_are_not_all_of_it_are_refused_with_the_reason(parts, why):
    with pytest.raises(FailedPrecondition, match=why) as error:
        check_views(of_ranks(*parts), whole(SIZE), {"w": (4, 3)}, 0, len(parts))
    assert error.value.reason == "PARAMETER_REFUSED"
    assert error.value.tensors.keys() == {"w"}


def test_a_rank_without_a_view_is_refused():
    with pytest.raises(FailedPrecondition) as error:
        check_views(of_ranks([0, 1, 2, 3]), whole(SIZE), {"w": (4, 3)}, 0, 2)
    assert error.value.reason == "PARAMETER_UNMAPPED"


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
        found = check_views(list(pair), whole(size), expected)
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
    pair[1].tensor = "u"
    expected = {"a": (2, 3), "b": (2, 3)}
    assert len(check_views(pair, whole(SIZE, (0, 1)), expected)) == 2


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


MEMFD = pb.MemfdHandle(pid=1, fd=3, inode=9)
IPC = pb.CudaIpcHandle(
    device_uuid="u", handle=b"h", reference_counter_handle=b"r", event_handle=b"e"
)


def good_manifest(handle=MEMFD):
    manifest = pb.WeightManifest(epoch="e", tensor_parallel_size=1)
    kind = "cuda_ipc" if handle is IPC else "memfd"
    manifest.buffers.add(buffer_id=0, size_bytes=64, **{kind: handle})
    manifest.buffers.add(buffer_id=1, size_bytes=16, **{kind: handle})
    add = manifest.tensors.add
    add(name="a", dtype="float32", shape=[2, 3], stride=[3, 1], offset_bytes=0, alias_group=0)
    add(name="b", dtype="bfloat16", shape=[3], stride=[2], offset_bytes=24, alias_group=1)
    add(name="tied", dtype="float32", shape=[3, 2], stride=[1, 3], offset_bytes=0, alias_group=0)
    add(name="c", dtype="float32", shape=[4], stride=[1], buffer_id=1, alias_group=2)
    return manifest


def of_manifest(manifest, epoch="e"):
    with pytest.raises(FailedPrecondition) as error:
        check_manifest(manifest, epoch)
    assert "Nothing was written." in error.value.message
    return error.value.reason


@pytest.mark.parametrize("handle", [MEMFD, IPC])
def test_a_manifest_that_holds_together_says_where_each_tensor_lies(handle):
    regions = check_manifest(good_manifest(handle), "e")
    assert regions["a"] == regions["tied"] == (0, 0, 24, 0)
    assert (regions["b"], regions["c"]) == ((0, 24, 34, 1), (1, 0, 16, 2))


def test_a_manifest_of_another_engine_process_is_refused():
    assert of_manifest(good_manifest(), "another") == "EPOCH_CHANGED"
    manifest = good_manifest()
    manifest.ClearField("epoch")
    assert of_manifest(manifest, "") == "EPOCH_CHANGED"


BUFFERS = {
    "none": lambda m: m.ClearField("buffers"),
    "one twice": lambda m: setattr(m.buffers[1], "buffer_id", 0),
    "empty": lambda m: setattr(m.buffers[1], "size_bytes", 0),
    "negative": lambda m: setattr(m.buffers[1], "size_bytes", -4),
    "larger than any memory": lambda m: setattr(m.buffers[1], "size_bytes", 2**60),
    "without a handle": lambda m: m.buffers[1].ClearField("memfd"),
    "on a GPU and on the CPU": lambda m: m.buffers[1].cuda_ipc.CopyFrom(IPC),
}
HANDLES = {
    "no device": lambda h: h.ClearField("device_uuid"),
    "another device than the first": lambda h: setattr(h, "device_uuid", "v"),
    "no handle": lambda h: h.ClearField("handle"),
    "no counter": lambda h: h.ClearField("reference_counter_handle"),
    "before the allocation": lambda h: setattr(h, "offset_bytes", -8),
}


@pytest.mark.parametrize("spoil", BUFFERS.values(), ids=BUFFERS)
def test_impossible_buffers_are_refused(spoil):
    manifest = good_manifest()
    spoil(manifest)
    assert of_manifest(manifest) == "MANIFEST_INVALID"


@pytest.mark.parametrize("spoil", HANDLES.values(), ids=HANDLES)
def test_incomplete_handles_of_gpu_memory_are_refused(spoil):
    manifest = good_manifest(IPC)
    spoil(manifest.buffers[1].cuda_ipc)
    assert of_manifest(manifest) == "MANIFEST_INVALID"


@pytest.mark.parametrize(("rank", "size"), [(0, 0), (0, 2), (0, -1), (1, 1)])
def test_another_worker_than_that_of_this_rank_is_refused(rank, size):
    manifest = good_manifest()
    manifest.tensor_parallel_rank, manifest.tensor_parallel_size = rank, size
    assert of_manifest(manifest) == "TENSOR_PARALLEL_UNSUPPORTED"


def test_tensors_that_overlap_outside_their_alias_group_are_refused():
    manifest = good_manifest()
    manifest.tensors[1].offset_bytes = 22
    assert of_manifest(manifest) == "MANIFEST_INVALID"


@st.composite
def forged(draw):
    """A good manifest with one number of one tensor or buffer replaced by any other."""
    manifest = good_manifest(draw(st.sampled_from([MEMFD, IPC])))
    number = st.integers(-(2**40), 2**40) | st.integers(-80, 80)
    tensor = manifest.tensors[draw(st.integers(0, 3))]
    match draw(st.sampled_from(["offset", "shape", "stride", "buffer", "size", "dtype", "sides"])):
        case "offset":
            tensor.offset_bytes = draw(number)
        case "shape":
            tensor.shape[0] = draw(number)
        case "stride":
            tensor.stride[0] = draw(number)
        case "buffer":
            tensor.buffer_id = draw(st.integers(-3, 3))
        case "size":
            manifest.buffers[tensor.buffer_id].size_bytes = draw(number)
        case "dtype":
            tensor.dtype = draw(st.sampled_from(["float64", "bfloat16", "Tensor", "load", ""]))
        case "sides":
            tensor.stride.append(draw(number))
    return manifest


def span(tensor):
    """First byte and one past the last, by counting every element."""
    width = getattr(torch, tensor.dtype).itemsize
    corners = itertools.product(*[{0, n - 1} for n in tensor.shape])
    at = [sum(i * s for i, s in zip(c, tensor.stride, strict=True)) for c in corners]
    first = tensor.offset_bytes
    return first + min(at) * width, first + (max(at) + 1) * width


@QUICK
@given(forged())
def test_a_forged_manifest_is_refused_or_keeps_every_tensor_inside_and_apart(manifest):
    try:
        check_manifest(manifest, "e")
    except FailedPrecondition as error:
        assert error.reason == "MANIFEST_INVALID"
        return
    spans = [(t.buffer_id, *span(t), t.alias_group) for t in manifest.tensors]
    sizes = {b.buffer_id: b.size_bytes for b in manifest.buffers}
    for buffer, start, end, _ in spans:
        assert 0 <= start < end <= sizes[buffer]
    for (b1, s1, e1, g1), (b2, s2, e2, g2) in itertools.combinations(spans, 2):
        assert b1 != b2 or g1 == g2 or e1 <= s2 or e2 <= s1


@QUICK
@given(st.data())
def test_a_truncated_manifest_is_refused(data):
    whole = good_manifest(IPC).SerializeToString()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        manifest = pb.WeightManifest.FromString(cut)
    except DecodeError:
        return
    # Cut between two whole tensors, what is left holds together; the map misses the others.
    views = [
        view(t.name, tuple(t.shape), tuple(t.stride), t.offset_bytes, t.dtype, t.buffer_id)
        for t in good_manifest().tensors
        if t.name != "tied"
    ]
    for each in views:
        each.tensor = each.name
    with pytest.raises(FailedPrecondition):
        check_views(views, check_manifest(manifest, "e"), {v.name: tuple(v.shape) for v in views})


def test_a_view_outside_the_tensor_that_it_names_is_refused():
    regions = {"t": Span(0, 0, 24, 0), "u": Span(0, 24, 48, 1)}
    assert refused([view(offset=4)], regions=regions) == "MAP_OUT_OF_BOUNDS"
    there = view(offset=24)
    there.tensor = "u"
    check_views([there], regions, {"w": (2, 3)})
    there.tensor = "nowhere"
    assert refused([there], regions=regions) == "MAP_OUT_OF_BOUNDS"


def test_three_names_are_told_and_of_more_their_number():
    assert named(["a"]) == "a"
    assert named(["a", "b", "c"]) == "a, b, c"
    assert named(["a", "b", "c", "d", "e"]).startswith("a, b, c and 2 more (")
    assert "doctor --json" in named(dict.fromkeys("abcd", "why"))


def test_a_cause_that_others_worded_is_told_by_its_first_sentence():
    assert shortened("no module named 'model.x' in Some. The available: {...}") == (
        "no module named 'model.x' in Some"
    )
    assert shortened("one line\nand a traceback") == "one line"
    assert shortened("vLLM's loader copies no part of it") == "vLLM's loader copies no part of it"
    assert len(shortened("word " * 1000)) <= 200
