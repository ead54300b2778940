"""What is recorded of a loader, and that it writes nothing."""

from __future__ import annotations

import pytest
import torch

from apollo_sidecar.loader_trace import LoaderTrace

SHAPE = (4, 6)


class Bench:
    """Live weights [4, 6] and [6], and one source of 24 elements, traced together."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.arange(24.0).view(SHAPE))
        self.bias = torch.nn.Parameter(torch.full((6,), 3.0))
        self.source = torch.empty(24, device="meta")
        live = [self.weight.untyped_storage(), self.bias.untyped_storage()]
        self.trace = LoaderTrace(live, [self.source])
        self.loaded = self.source.view(SHAPE)

    def run(self, loader):
        with torch.no_grad(), self.trace:
            loader(self)
        assert torch.equal(self.weight, torch.arange(24.0).view(SHAPE))
        assert torch.equal(self.bias, torch.full((6,), 3.0))
        return self.trace


# What vLLM's loaders do to a weight before or while they copy it: (loader, source region).
COPIES = [
    (lambda b: b.weight.copy_(b.loaded), (0, (4, 6), (6, 1))),
    (lambda b: b.weight.data.copy_(b.loaded), (0, (4, 6), (6, 1))),
    (lambda b: b.weight[1:3].copy_(b.loaded[2:4]), (12, (2, 6), (6, 1))),
    (lambda b: b.weight.narrow(1, 2, 3).copy_(b.loaded.narrow(1, 0, 3)), (0, (4, 3), (6, 1))),
    (lambda b: b.weight.copy_(b.source.view(6, 4).t()), (0, (4, 6), (1, 4))),
    (lambda b: b.weight.view(-1).copy_(b.loaded.view(-1)), (0, (24,), (1,))),
    (lambda b: b.weight.copy_(b.loaded.clone()), (0, (4, 6), (6, 1))),
    (lambda b: b.weight.copy_(b.loaded.to("cpu").float()), (0, (4, 6), (6, 1))),
    (lambda b: b.weight.copy_(b.source.view(6, 4).t().contiguous()), (0, (4, 6), (1, 4))),
    (lambda b: b.weight[0].copy_(b.loaded.chunk(2)[1][0]), (12, (6,), (1,))),
    (lambda b: b.bias.__setitem__(slice(0, 6), b.loaded[3]), (18, (6,), (1,))),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(COPIES)))
def test_a_copy_is_recorded_with_its_source_region_and_not_done(number):
    loader, (offset, shape, stride) = COPIES[number]
    trace = Bench().run(loader)
    assert trace.other_writes == []
    (copy,) = trace.copies
    assert (copy.source.offset, copy.source.shape, copy.source.stride) == (offset, shape, stride)


def test_the_target_region_is_that_of_the_live_view():
    (copy,) = Bench().run(lambda b: b.weight[1:3, 2:4].copy_(b.loaded[:2, :2])).copies
    assert (copy.target.offset, copy.target.shape, copy.target.stride) == (8, (2, 2), (6, 1))
    assert copy.target.bounds() == (8, 15)
    assert copy.dtype is torch.float32


def test_a_broadcast_source_shows_as_stride_zero():
    (copy,) = Bench().run(lambda b: b.weight.copy_(b.loaded[0])).copies
    assert copy.source.stride == (0, 1)


# Writes whose value is computed, by operator name.
COMPUTED = [
    ("fill_", lambda b: b.weight.fill_(0.0)),
    ("zero_", lambda b: b.weight.data.zero_()),
    ("copy_", lambda b: b.weight.copy_(b.loaded + 1)),
    ("copy_", lambda b: b.weight.copy_(-torch.exp(b.loaded.float()))),
    ("copy_", lambda b: b.weight.copy_(torch.ones(SHAPE))),
    ("copy_", lambda b: b.weight.copy_(torch.cat([b.loaded[:2], b.loaded[2:]]))),
    ("mul_", lambda b: b.weight.mul_(b.loaded)),
    ("add_", lambda b: b.weight.add_(1)),
    ("_foreach_add_", lambda b: torch._foreach_add_([b.weight, b.bias], 1.0)),
    ("mul", lambda b: torch.mul(b.loaded, 2, out=b.weight)),
]


@pytest.mark.parametrize("number", range(len(COMPUTED)))
def test_a_computed_value_is_recorded_as_no_copy_and_not_written(number):
    operator, loader = COMPUTED[number]
    trace = Bench().run(loader)
    assert trace.copies == []
    assert {write.operator for write in trace.other_writes} == {operator}


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.loaded.mul_(2),
        lambda b: b.loaded.clone().mul_(2),
        lambda b: b.loaded[1].add_(1),
        lambda b: b.loaded.fill_(0),
        lambda b: torch._foreach_add_([b.loaded], 1.0),
    ],
)
def test_a_source_that_the_loader_changed_no_longer_counts_as_a_source(change):
    def loader(bench):
        change(bench)
        bench.weight.copy_(bench.loaded)

    trace = Bench().run(loader)
    assert trace.copies == []
    assert [write.operator for write in trace.other_writes] == ["copy_"]


def test_a_write_knows_how_many_copies_came_before():
    def loader(bench):
        bench.bias.zero_()
        bench.weight.copy_(bench.loaded)
        bench.bias.zero_()

    assert [w.copies_before for w in Bench().run(loader).other_writes] == [0, 1]


def test_a_loader_may_read_a_scalar_and_compare_tensors():
    def loader(bench):
        assert bench.loaded[0, 0].item() == 1.0
        assert torch.equal(bench.loaded, bench.loaded)
        bench.weight.copy_(bench.loaded)

    assert len(Bench().run(loader).copies) == 1


def filled_from(read):
    """The trace of a loader that fills two live scalars with what it read of two sources."""
    gain, scale = torch.zeros(()), torch.zeros(1)
    sources = [torch.empty(1, device="meta") for _ in range(2)]
    trace = LoaderTrace([gain.untyped_storage(), scale.untyped_storage()], sources)
    with torch.no_grad(), trace:
        # As vLLM's default loader where a parameter has one element.
        gain.fill_(read(sources[1]))
        scale.fill_(read(sources[0]))
    assert (gain.item(), scale.item()) == (0.0, 0.0)
    return trace, [source.untyped_storage()._cdata for source in sources]


def test_an_element_that_is_written_as_it_was_read_is_a_copy_of_its_source():
    trace, (first, second) = filled_from(lambda source: source.item())
    assert trace.other_writes == []
    assert [copy.source.storage for copy in trace.copies] == [second, first]
    assert [copy.target.shape for copy in trace.copies] == [(), (1,)]


@pytest.mark.parametrize(
    "read", [lambda s: s.item() * 2, lambda s: (s + 1).item(), lambda s: 1.0, lambda s: 0.0]
)
def test_an_element_that_is_computed_from_one_that_was_read_is_no_copy(read):
    trace, _ = filled_from(read)
    assert trace.copies == []
    assert [write.operator for write in trace.other_writes] == ["fill_", "fill_"]


def test_memory_that_is_not_live_is_written_as_ever():
    other = torch.zeros(3)
    Bench().run(lambda b: other.fill_(5))
    assert torch.equal(other, torch.full((3,), 5.0))
