"""Debian's Prometheus reads a server: the alerts that are shipped fire, and clear."""

from __future__ import annotations

import json
import logging
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apollo_client import ApolloClient
from apollo_grpc.v1 import training_pb2 as pb
from tests.waiting import HANG, wait_until

ROOT = Path(__file__).parents[2]
RULES, DASHBOARD = ROOT / "deploy/alerts.yml", ROOT / "deploy/grafana.json"
# What .ci/prometheus fetches, or what this system has.
FETCHED = ROOT / "build/prometheus"


def program(name: str) -> str:
    found = shutil.which(name, path=str(FETCHED)) or shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name}: .ci/prometheus fetches it from Debian, or says why not")
    return found


def check(rules: Path) -> str:
    done = subprocess.run(
        [program("promtool"), "check", "rules", str(rules)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_rules_are_right() -> None:
    assert "SUCCESS: 3 rules found" in check(RULES)


def test_prometheus_can_read_what_the_dashboard_asks_for(tmp_path: Path) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    rules = [{"record": f"asked:{n}", "expr": expression} for n, expression in enumerate(asked)]
    # JSON is YAML.
    (tmp_path / "rules.yml").write_text(
        json.dumps({"groups": [{"name": "asked", "rules": rules}]}).replace("$instance", ".*")
    )
    assert f"SUCCESS: {len(asked)} rules found" in check(tmp_path / "rules.yml")


class Prometheus:
    """One that reads an address many times a second, with the shipped rules made quick."""

    def __init__(self, folder: Path, target: str):
        quick = re.sub(r"for: \w+", "for: 0s", RULES.read_text()).replace("[15m]", "[1s]")
        (folder / "alerts.yml").write_text(quick)
        often = {"scrape_interval": "100ms", "scrape_timeout": "100ms"}
        config = {
            "global": often | {"evaluation_interval": "100ms"},
            "rule_files": ["alerts.yml"],
            "scrape_configs": [
                {"job_name": "apollo", "static_configs": [{"targets": [target]}]},
            ],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{free.getsockname()[1]}"
        self._log = (folder / "prometheus.log").open("w+")
        self._process = subprocess.Popen(
            [
                *(program("prometheus"), f"--config.file={folder}/prometheus.yml"),
                *(f"--storage.tsdb.path={folder}/data", f"--web.listen-address={self._address}"),
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def firing(self) -> set[str]:
        """Names of the alerts that fire now; none while it starts."""
        assert self._process.poll() is None, Path(self._log.name).read_text()
        url = f"http://{self._address}/api/v1/alerts"
        try:
            with urllib.request.urlopen(url, timeout=HANG) as answer:
                found = json.load(answer)["data"]["alerts"]
        except OSError:
            return set()
        return {each["labels"]["alertname"] for each in found if each["state"] == "firing"}

    def wait_for(self, *alerts: str, doing: Callable[[], object] = lambda: None) -> None:
        """Waits until these fire, and no others, and does something again and again meanwhile."""
        wait_until(lambda: (doing(), self.firing() == set(alerts))[1], f"{alerts or 'no alert'}")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(HANG)
        self._log.close()


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[str], Prometheus]]:
    """Starts one that reads an address."""
    started = list[Prometheus]()

    def start(target: str) -> Prometheus:
        started.append(Prometheus(tmp_path, target))
        return started[-1]

    yield start
    for each in started:
        each.stop()


def test_each_alert_fires_and_clears(
    start_engine: Any,
    start_server: Any,
    prometheus: Callable[[str], Prometheus],
    caplog: pytest.LogCaptureFixture,
) -> None:
    program("prometheus")
    with caplog.at_level(logging.INFO):
        caller = start_server(metrics_address="127.0.0.1:0")
    watching = prometheus(re.findall(r"http://(127\.0\.0\.1:\d+)/metrics", caplog.text)[0])
    watching.wait_for("ApolloNoEngine")
    start_engine()
    watching.wait_for()
    watching.wait_for("ApolloRunsFail", doing=lambda: caller.train(guard=pb.Guard(max_loss=1e-9)))
    # With what it looks back at over, none failed.
    watching.wait_for()
    caller.train()
    watching.wait_for("ApolloUpdatesNotSynced")
    with ApolloClient(caller.address) as client:
        client.sync()
    watching.wait_for()
