"""The random projection: its distribution, its bits, and the published seed chain."""

import hashlib
import math

import pytest
import torch

from apollo_trainer.optim import projection
from apollo_trainer.optim.projection import draw_apollo_torch_projection, draw_projection

CPU = torch.device("cpu")


def test_entries_are_normal_with_variance_one_over_rank():
    P = draw_projection((1, 2), 0, 64, 4096, CPU).double() * math.sqrt(64)
    assert P.shape == (64, 4096)
    assert abs(P.mean()) < 0.01
    assert abs(P.var() - 1) < 0.01
    assert abs((P**4).mean() - 3) < 0.06
    normal = torch.distributions.Normal(0.0, 1.0)
    sorted_cdf = normal.cdf(P.flatten().sort().values)
    even = torch.arange(1, P.numel() + 1, dtype=torch.float64) / P.numel()
    assert (sorted_cdf - even).abs().max() < 1.95 / math.sqrt(P.numel())  # Kolmogorov, 0.1 %


def test_rows_keep_squared_length_on_average():
    P = draw_projection((1, 2), 0, 256, 1000, CPU)
    x = torch.linspace(-1, 1, 1000)
    assert (P @ x).square().sum() == pytest.approx(float(x.square().sum()), rel=0.2)


def test_the_quantiles_are_those_of_the_normal_distribution():
    table = projection.normal_quantiles(CPU).double()
    exact = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
    assert torch.allclose(table, exact, rtol=2**-8, atol=0)
    assert torch.equal(table, -table.flip(0))


def test_the_bits_are_pinned():
    # Moments saved by one version are only meaningful with the same P in the next.
    P = draw_projection((0x12345678, 0x9ABCDEF0), 3, 5, 7, CPU)
    digest = hashlib.sha256(P.numpy().tobytes()).hexdigest()
    assert digest == "2b2489e2a693dba16f100779efe29fa2e8f90a08375efda95aa626341a714ed8"


def test_windows_and_keys_give_other_projections():
    base = draw_projection((1, 2), 0, 8, 32, CPU)
    assert torch.equal(base, draw_projection((1, 2), 0, 8, 32, CPU))
    for other in (draw_projection((1, 2), 1, 8, 32, CPU), draw_projection((2, 2), 0, 8, 32, CPU)):
        assert torch.corrcoef(torch.stack((base.flatten(), other.flatten())))[0, 1].abs() < 0.2


def test_published_seed_chain():
    first = torch.randn((4, 6), generator=torch.Generator().manual_seed(3)) / 2
    assert torch.equal(draw_apollo_torch_projection(3, 0, 4, 6, True, CPU), first)
    generator = torch.Generator().manual_seed(3)
    seed = int(torch.randint(0, 2**63 - 1, (15,), generator=generator)[-1])
    second = torch.randn((6, 4), generator=torch.Generator().manual_seed(seed)) / 2
    assert torch.equal(draw_apollo_torch_projection(3, 1, 4, 6, False, CPU), second.t())
