"""Philox4x32-10 against the published Random123 vectors, and the layout of its draws."""

import pytest
import torch

from apollo_trainer.optim.philox import MASK32, derive_key, draw_16_bits, draw_words, philox

CPU = torch.device("cpu")
# kat_vectors of Random123 1.14, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor(word) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_counters_broadcast_like_single_calls():
    block = torch.arange(5)
    words = philox((block, *(torch.tensor(n) for n in (7, 8, 9))), (1, 2))
    for n in range(5):
        single = philox(tuple(torch.tensor(c) for c in (n, 7, 8, 9)), (1, 2))
        assert [int(w[n]) for w in words] == [int(w) for w in single]


@pytest.mark.parametrize(("first", "count"), [(0, 8), (13, 50), (7, 1), (8, 3), (5, 0)])
def test_a_draw_depends_on_its_element_alone(first, count):
    whole = draw_16_bits((3, 4), 11, 0, 128, CPU)
    part = draw_16_bits((3, 4), 11, first, count, CPU)
    assert torch.equal(part, whole[first : first + count])


def test_one_block_feeds_eight_elements_low_halves_first():
    words = [int(w) for w in philox(tuple(torch.tensor(c) for c in (2, 0, 9, 0)), (3, 4))]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert draw_16_bits((3, 4), 9, 16, 8, CPU).tolist() == halves


def test_counters_above_32_bits_do_not_wrap():
    far = draw_words((1, 2), 0, 2**32 + 5, 1, CPU)
    expected = philox(tuple(torch.tensor(c) for c in (5, 1, 0, 0)), (1, 2))
    assert far[0].tolist() == [int(w) for w in expected]
    late = draw_words((1, 2), 2**32 + 6, 0, 1, CPU)
    expected = philox(tuple(torch.tensor(c) for c in (0, 0, 6, 1)), (1, 2))
    assert late[0].tolist() == [int(w) for w in expected]


def test_draws_are_uniform_over_16_bits():
    bits = draw_16_bits((5, 6), 1, 0, 2**18, CPU)
    assert bits.min() >= 0
    assert bits.max() <= 0xFFFF
    counts = torch.bincount(bits >> 8, minlength=256).double()
    chi_square = ((counts - 1024) ** 2 / 1024).sum()
    assert 180 < chi_square < 340  # 255 degrees of freedom


def test_keys_are_stable_and_separate():
    assert derive_key(0, "layers.0.weight", "rounding") == (688005484, 2304098879)
    keys = {
        derive_key(seed, name, domain)
        for seed in (0, 1)
        for name in ("a", "b", "1/a")
        for domain in ("projection", "rounding")
    }
    assert len(keys) == 12
    assert all(0 <= word <= MASK32 for key in keys for word in key)
