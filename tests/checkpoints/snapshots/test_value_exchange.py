"""Values change places piece by piece; what cannot be written is taken back, all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apollo_trainer.checkpoints.disk.digests import digest
from apollo_trainer.checkpoints.disk.threads import spread
from apollo_trainer.checkpoints.snapshots import value_exchange
from apollo_trainer.checkpoints.snapshots.value_exchange import Exchange
from apollo_trainer.weights.checkpoint_reader import same_bytes

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_exchange, "PIECE", 100)


def pairs() -> Pairs:
    torch.manual_seed(5)
    shapes = [(7,), (50, 41), (3000,), (0, 4), (), (20, 30)]
    made = [(torch.randn(shape), torch.randn(shape)) for shape in shapes]
    made.append((torch.randn(40, 30).T, torch.randn(30, 40)))
    made.append((torch.randn(999).bfloat16(), torch.randn(999).bfloat16()))
    return made


def copied(of: Pairs) -> Pairs:
    return [(live.clone(), host.clone()) for live, host in of]


def assert_same(mine: Pairs, wanted: Pairs) -> None:
    for a, b in zip(mine, wanted, strict=True):
        assert same_bytes(a[0], b[0])
        assert same_bytes(a[1], b[1])


@pytest.mark.parametrize("threads", [1, 4])
def test_all_values_change_places(threads: int) -> None:
    mine = [pair for _ in range(8) for pair in pairs()]
    before, exchange = copied(mine), Exchange()
    digests = spread(lambda pair: exchange.run(*pair), mine, threads)
    assert_same(mine, [(host, live) for live, host in before])
    assert digests == [digest(host) for _, host in before]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("good", [0, 1, 5, 17, 40, 400])
def test_what_cannot_be_written_is_taken_back_with_all_before_it(
    monkeypatch: pytest.MonkeyPatch, good: int, threads: int
) -> None:
    mine, left = [pair for _ in range(8) for pair in pairs()], [good]
    before, write = copied(mine), value_exchange._write

    def failing(live: Any, values: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            half = len(live.reshape(-1)) // 2
            live.reshape(-1)[:half] = values.reshape(-1)[:half]
            raise OSError(5, "Input/output error")
        write(live, values)

    exchange = Exchange()
    with monkeypatch.context() as patch:
        patch.setattr(value_exchange, "_write", failing)
        with pytest.raises(OSError, match="Input/output"):
            spread(lambda pair: exchange.run(*pair), mine, threads)
    exchange.take_back()
    for (live, _), (wanted, _) in zip(mine, before, strict=True):
        assert same_bytes(live, wanted)
