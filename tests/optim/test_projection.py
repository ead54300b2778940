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


def test_the_series_agree_with_the_library():
    word = torch.tensor([0, 1, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**30 + 7, 2**32 - 1])
    u = (word.double() + 0.5) / 2**32
    assert torch.allclose(projection._log_uniform(word), u.log(), rtol=1e-12, atol=1e-13)
    quarter = (word >> 30).double()
    x = ((word & 0x3FFFFFFF).double() + 0.5) / 2**30 - 0.5 + quarter
    cosine, sine = projection._unit_circle(word)
    assert torch.allclose(cosine, (x * math.pi / 2).cos(), rtol=0, atol=1e-12)
    assert torch.allclose(sine, (x * math.pi / 2).sin(), rtol=0, atol=1e-12)


def test_the_bits_are_pinned():
    # Moments saved by one version are only meaningful with the same P in the next.
    P = draw_projection((0x12345678, 0x9ABCDEF0), 3, 5, 7, CPU)
    digest = hashlib.sha256(P.numpy().tobytes()).hexdigest()
    assert digest == "b009fa5b6c74702a1b47d6301e8e04d56dd42f6aa0aacc7dbc7dc77379e3780b"


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
