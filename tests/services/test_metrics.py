"""The training server's own metrics, read over HTTP while it serves."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from apollo_client import ApolloClient
from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.snapshots import SnapshotStore
from apollo_trainer.config import Settings
from apollo_trainer.main import TrainingServer
from tests.certificates import Authority
from tests.waiting import HANG, wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"
Figures = Callable[..., float]


class Read:
    """The figures of one reading: by name and labels, 0 where there is none."""

    def __init__(self, url: str):
        with urllib.request.urlopen(url, timeout=HANG) as answer:
            self.text = answer.read().decode()
        self.samples = [
            sample
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
        ]

    def __call__(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == f"apollo_{name}" and labels.items() <= sample.labels.items()
        )


@pytest.fixture
def measured(
    start_engine: Any, start_server: Any, caplog: pytest.LogCaptureFixture
) -> tuple[Any, Callable[[], Read]]:
    """A caller of an attached server, and what reads its metrics."""
    start_engine()
    with caplog.at_level(logging.INFO):
        caller = start_server(metrics_address="127.0.0.1:0")
    url = re.findall(r"metrics are at (http://127\.0\.0\.1:\d+/metrics)", caplog.text)[0]
    caller.wait_attached()
    return caller, lambda: Read(url)


def test_a_run_a_sync_a_refusal_and_a_failure_are_in_the_figures(
    measured: Any, error_of: Any, state_dir: Path
) -> None:
    caller, read = measured
    paused = pb.Coherence(mode=pb.COHERENCE_MODE_PAUSE_RUN)
    caller.train(epochs=3, coherence=paused)
    caller.train(guard=pb.Guard(max_loss=1e-9))
    error_of(caller.start(epochs=-1))
    method = "/apollo.v1.TrainingService/Train"
    refused = {"method": method, "code": "INVALID_ARGUMENT"}
    # A call is counted once its end was sent.
    wait_until(lambda: read()("rpc_seconds_count", **refused) == 1, "the refusal")
    figures = read()
    assert (figures("attached"), figures("queued_runs"), figures("active_runs")) == (1, 0, 0)
    assert (figures("steps_total"), figures("tokens_total")) == (3, 12)
    assert figures("last_loss_nats") > 0
    assert figures("step_seconds_total", phase="forward") > 0
    assert figures("paused_seconds_total") > 0
    assert figures("runs_total", state="succeeded") == 1
    assert figures("run_failures_total", reason="GUARD_MAX_LOSS") == 1
    assert figures("weight_version") == figures("unsynced_updates") > 0
    assert figures("ledger_commit_seconds_count") > 0
    assert figures("rpc_seconds_count", method=method, code="OK") == 2
    with ApolloClient(f"unix:{state_dir}/training.sock") as client:
        client.sync()
        client.create_snapshot("one")
    figures = read()
    assert figures("unsynced_updates") == 0 < figures("sync_bytes_total")
    assert figures("sync_seconds_count") == 1
    assert figures("snapshot_bytes") > 0


def test_streams_count_once_they_have_ended_and_watchers_while_they_watch(measured: Any) -> None:
    caller, read = measured
    stream = caller.watch()
    next(stream)
    assert read()("watchers") == 1
    watched = {"method": "/apollo.v1.StatusService/WatchStatus"}
    assert read()("rpc_seconds_count", **watched) == 0
    stream.cancel()
    wait_until(lambda: read()("rpc_seconds_count", code="CANCELLED", **watched), "the stream's end")
    assert read()("watchers") == 0


def test_a_disk_that_cannot_be_read_takes_no_other_figure_away(
    measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(store: SnapshotStore) -> Any:
        raise OSError("Input/output error")

    _, read = measured
    monkeypatch.setattr(SnapshotStore, "list", refused)
    figures = read()
    assert math.isnan(figures("snapshot_bytes"))
    assert figures("attached") == 1


def test_the_dashboard_and_the_alerts_ask_for_figures_that_there_are(measured: Any) -> None:
    caller, read = measured
    caller.train(guard=pb.Guard(max_loss=1e-9))
    known = {sample.name for sample in read().samples}
    board = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += re.findall(r"expr: .*?for:", (DEPLOY / "alerts.yml").read_text(), re.S)
    names = [set(re.findall(r"apollo_\w+", expression)) for expression in asked]
    assert [found for found in names if not found] == []
    # Of what has not come about, there are no figures yet.
    assert set().union(*names) - known == set()


@pytest.mark.parametrize(
    ("address", "words"),
    [("0.0.0.0:0", "beyond this machine"), ("unix:metrics.sock", "is a socket")],
)
async def test_what_is_no_address_of_metrics_ends_the_start(
    state_dir: Path, address: str, words: str
) -> None:
    settings = Settings(state_dir=state_dir, metrics_address=address)
    with pytest.raises(InvalidArgument, match=words):
        TrainingServer(settings)


async def test_beyond_this_machine_the_servers_token_is_asked_for(
    state_dir: Path, tmp_path: Path, start_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = Authority(tmp_path, "ours").issue("server")
    with caplog.at_level(logging.INFO):
        start_server(metrics_address="0.0.0.0:0", tls_certificate=certificate, tls_key=key)
    assert re.search(r"metrics are at https://0\.0\.0\.0:\d+/metrics", caplog.text)
    assert (state_dir / "token").read_text()


async def test_without_prometheus_client_the_start_says_what_to_install(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("prometheus_client", "apollo_trainer.watching.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    settings = Settings(state_dir=state_dir, metrics_address="127.0.0.1:0")
    with pytest.raises(FailedPrecondition, match=r"pip install 'apollo-grpc\[metrics\]'"):
        TrainingServer(settings)
