"""Times between tokens, as vLLM's metrics tell them."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from vllm.v1.metrics.stats import IterationStats

from apollo_sidecar.token_times import KEPT, TokenTimes, listen


def told(client: Any, *gaps: float) -> None:
    """As vLLM's output handler tells all its loggers (StatLoggerManager.record)."""
    stats = IterationStats()
    stats.inter_token_latencies_iter = list(gaps)
    for logger in client.logger_manager.stat_loggers:
        logger.record(None, stats, mm_cache_stats=None, engine_idx=0)


def client_of(*loggers: Any) -> Any:
    return SimpleNamespace(logger_manager=SimpleNamespace(stat_loggers=list(loggers)))


def test_an_iteration_is_told_with_the_mean_of_its_requests() -> None:
    client, times = client_of(), TokenTimes()
    assert listen(client, times)
    told(client, 0.010, 0.020)
    ((ended, gap),), count = times.since(0)
    assert gap == 0.015
    assert 0 <= time.monotonic() - ended < 60
    assert times.since(count) == ([], count)


def test_first_tokens_and_idle_iterations_are_none() -> None:
    client, times = client_of(), TokenTimes()
    listen(client, times)
    told(client)
    client.logger_manager.stat_loggers[0].record(None, None)
    assert times.since(0) == ([], 0)


def test_a_reader_that_comes_late_gets_the_newest() -> None:
    times = TokenTimes()
    for number in range(KEPT + 10):
        times.add([float(number)])
    kept, count = times.since(5)
    assert (len(kept), count) == (KEPT, KEPT + 10)
    assert [each.gap for each in kept[-2:]] == [KEPT + 8, KEPT + 9]
    assert [each.gap for each in times.since(count - 1)[0]] == [KEPT + 9]


def test_other_loggers_go_on() -> None:
    other = object()
    client = client_of(other)
    listen(client, TokenTimes())
    assert client.logger_manager.stat_loggers[0] is other


def test_without_metrics_nothing_is_told() -> None:
    assert not listen(SimpleNamespace(logger_manager=None), TokenTimes())
    assert not listen(object(), TokenTimes())
