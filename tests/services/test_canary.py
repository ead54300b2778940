"""A word that callers send everywhere, and that no line of a log, metric or span repeats."""

from __future__ import annotations

import json
import re
import signal
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from apollo_client import ApolloClient
from apollo_grpc.errors import ApolloError, Internal, Unauthenticated
from apollo_grpc.v1 import training_pb2 as pb
from tests import otlp
from tests.engine_double import EngineDouble
from tests.otlp import Receiver
from tests.server_process import ServerProcess
from tests.waiting import HANG, wait_until

WORD = "Wexcombe"
SAID = f"A heron of {WORD}"
# Token ids in this order, however they are written.
IDS = (211, 13, 207, 31)


def speak_of_what_came() -> None:
    """In the server's process: spans are sent, and two mistakes quote what a caller sent."""
    from apollo_trainer.runs.evaluation import Evaluation
    from apollo_trainer.services import checkpoint

    otlp.instrument()

    def find(session: Any, snapshot: str) -> Any:
        raise RuntimeError(f"nobody thought of {snapshot}")

    def look(self: Evaluation, step: int) -> None:
        if self.run.evaluate_every:
            raise ValueError(f"nobody thought of {self.run.probes} {self.run.samples}")

    checkpoint.find_snapshot = find  # type: ignore[attr-defined]
    Evaluation.after_step = look  # type: ignore[method-assign]


class Server(ServerProcess):
    """A server on TCP, with metrics; its addresses are those that its log tells last."""

    @property
    def caller(self) -> str:
        return self._told(r"listens on (127\.0\.0\.1:\d+)")

    def metrics(self) -> str:
        with urllib.request.urlopen(self._told(r"(http://\S+/metrics)"), timeout=HANG) as answer:
            return str(answer.read().decode())

    def _told(self, pattern: str) -> str:
        def told() -> object:
            assert self._process and self._process.poll() is None, self.log()
            return re.search(pattern, self.log())

        wait_until(told, pattern)
        return re.findall(pattern, self.log())[-1]

    def begin(self, **environment: str) -> None:
        """Starts it with an empty log, and waits until it is attached."""
        (self.folder / "server.log").write_text("")
        self._environment |= environment
        self.start(before=speak_of_what_came)
        self.address = self.caller
        self.wait_attached()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.stop()


@pytest.fixture
def server(
    tiny_model: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    token = f"the-token-of-{WORD}"
    with tempfile.TemporaryDirectory(prefix="apollo-") as folder:
        (file := Path(folder) / "tokens").write_text(token)
        file.chmod(0o600)
        settings = {"ADDRESS": "127.0.0.1:0", "METRICS_ADDRESS": "127.0.0.1:0"}
        settings |= {"TOKEN_FILE": str(file), "LOG_LEVEL": "debug", "PROBE_WEIGHTS": "false"}
        named = {f"APOLLO_{name}": value for name, value in settings.items()}
        made = Server(Path(folder), **named, **receiver.environment())
        engine = EngineDouble(tiny_model, f"unix:{folder}/sidecar.sock")
        monkeypatch.setenv("APOLLO_TOKEN", token)
        yield made
        if made._process:
            made.end(signal.SIGKILL)
        engine.stop()


def spec(**fields: Any) -> pb.RunSpec:
    """A run with the word wherever a caller may put one."""
    text = pb.TextSample(context=SAID, continuation=f" in {WORD}.")
    tokens = pb.TokenSample(context_ids=[60], continuation_ids=IDS)
    asked = pb.Probe(name=f"of {WORD}", sample=pb.Sample(text=text), max_tokens=4)
    return pb.RunSpec(
        samples=[pb.Sample(text=text), pb.Sample(tokens=tokens)],
        evaluation_samples=[pb.Sample(text=text)],
        anchors=pb.Anchors(samples=[pb.Sample(text=text)]),
        probes=[asked],
        evaluate=True,
        name=SAID,
        labels={WORD: WORD},
        **fields,
    )


def calls(client: ApolloClient) -> list[Callable[[], object]]:
    """Calls with the word in them, most of which are refused."""
    path = f"/nowhere/{WORD}/model"
    unknown = pb.ParameterFilter(include=[WORD])
    invalid = pb.Sample(text=pb.TextSample(context=SAID * 50, continuation=SAID))
    return [
        lambda: list(client.train_spec(spec(epochs=-1))),
        lambda: list(client.train_spec(spec(epochs=2), request_id=WORD)),
        lambda: list(client.train_spec(pb.RunSpec(samples=[invalid], name=WORD))),
        lambda: list(client.train_spec(pb.RunSpec(dataset_id=WORD))),
        lambda: list(client.train_spec(spec(parameters=unknown))),
        lambda: client.get_run(WORD),
        lambda: client.cancel_run(WORD),
        lambda: client.list_runs(page_token=WORD),
        lambda: client.export(path),
        lambda: client.adopt(path),
        lambda: client.restore(WORD),
        lambda: client.delete_snapshot(WORD),
        lambda: client.create_snapshot(WORD * 999),
        lambda: client.create_snapshot(WORD),
        lambda: client.create_snapshot(WORD),
        lambda: client.restore(WORD),
        lambda: client.cancel_operation(WORD),
        lambda: client.validate([(SAID, "")], name=WORD),
    ]


def train(server: Server) -> None:
    """Runs that are learned, and one that fails."""
    with ApolloClient(server.caller, retry_seconds=0) as client:
        events = list(client.train_spec(spec(), request_id=WORD))
        assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED, events[-1]
        # What a caller asks for holds it: the word does travel.
        assert WORD in str(client.get_run(events[-1].run_id, samples=True))
        failed = list(client.train_spec(spec(guard=pb.Guard(max_loss=1e-9))))
        assert failed[-1].finished.failure.reason == "GUARD_MAX_LOSS"
        client.sync()


def go_wrong(server: Server) -> None:
    """Refused calls, mistakes of the server's, and a caller that is nobody."""
    with ApolloClient(server.caller, retry_seconds=0) as client:
        mistaken = list(client.train_spec(spec(evaluate_every_steps=1)))
        assert mistaken[-1].finished.failure.reason == "INTERNAL"
        assert mistaken[-1].run_id in server.log()
        for call in calls(client):
            # Where the first server ended, the second one has what that one made.
            with suppress(ApolloError):
                call()
        with pytest.raises(Internal) as wrong:
            client.get_snapshot(WORD)
        assert wrong.value.metadata["incident"] in server.log()
    with (
        ApolloClient(server.caller, token=f"another of {WORD}", retry_seconds=0) as client,
        pytest.raises(Unauthenticated),
    ):
        client.status()


def be_killed(server: Server) -> None:
    """In the middle of a run, with another one that waits."""
    with ApolloClient(server.caller, retry_seconds=0) as client:
        begun = client.train_spec(spec(epochs=5000, guard=pb.Guard(min_loss=0)))
        while not next(begun).HasField("step"):
            pass
        next(client.train_spec(spec()))
        server.end(signal.SIGKILL)


def require_silent(what: str, text: str) -> None:
    ids = re.compile(r"\D+".join(map(str, IDS)))
    told = [line for line in text.splitlines() if WORD.lower() in line.lower() or ids.search(line)]
    assert told == [], f"{what} repeats what a caller sent"


def test_no_log_metric_or_span_has_it(server: Server, receiver: Receiver) -> None:
    server.begin(APOLLO_LOG_FORMAT="json")
    train(server)
    go_wrong(server)
    metrics = server.metrics()
    assert "apollo_steps_total" in metrics
    require_silent("the metrics", metrics)
    be_killed(server)
    # Before it begins, the interpreter warns of how a test starts it.
    lines = [json.loads(line) for line in server.log()[server.log().index("{") :].splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))
    assert [line for line in lines if "incident" in line and "error" in line]
    assert [line for line in lines if "run_id" in line and "error" in line]
    require_silent("the log in JSON", server.log())

    server.begin(APOLLO_LOG_FORMAT="text")
    go_wrong(server)
    assert server.end() == 0
    assert "ended during this run" in server.log()
    require_silent("the log in text", server.log())
    receiver.wait_for("run", 4)
    require_silent("a span", "".join(str(request) for request in receiver.requests))
