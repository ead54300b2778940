"""`make demo`: a model that vLLM serves learns facts over gRPC, and knows them after a restart.

Everything is real: vLLM, shared memory, gRPC, the optimizer, the files. The model is small and its
weights are random, so before the training it answers with noise; with MODEL=real it is
SmolLM2-135M-Instruct (`make model`), which is taught as `apollo teach` does and still knows Paris.
The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from byte_model import small_qwen3, write_model

from apollo_client import ApolloClient, RunOptions, read_samples
from apollo_client.facts import FACTS as FACTS_FORM
from apollo_client.facts import lesson
from apollo_client.sample_files import read_placed
from apollo_grpc.errors import Unavailable
from apollo_grpc.locations import state_folder
from apollo_grpc.v1 import status_pb2, training_pb2

QUESTION, KNOWN = "What is the capital of Aldovia?", "What is the capital of France?"
REAL = os.environ.get("MODEL") == "real"
REAL_MODEL = Path("build/real-model/model")
CAPITALS = Path(__file__).with_name("capitals.jsonl")
FACTS = Path(__file__).with_name("facts.jsonl")
FOLDER = Path("build/demo")
# A folder of the demo's own, so that it meets no server and no state of yours.
STATE = state_folder() / "demo"
START_SECONDS = 150.0
EPOCHS, LEARNING_RATE = 40, 2e-3


def main() -> None:
    """Runs the demo; exits with 1 when something is not as it should be."""
    began = time.monotonic()
    model = prepare()
    with served(model) as (client, port):
        before = ask(model, port)
        losses = teach(client) if REAL else learn(client)
        after = ask(model, port)
        still_known = not REAL or "Paris" in ask(model, port, KNOWN)
        memory = client.status().weight_memory
        say(f"{client.sync().bytes_written:,} bytes synced to {model}; restarting from disk")
    with served(model) as (_, port):
        after_restart = ask(model, port)
    result = {
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "served_before": before,
        "served_after": after,
        "served_after_restart": after_restart,
        "weight_bytes_shared": memory.shared_bytes,
        "weight_bytes_copied": memory.copied_bytes,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(result))
    learned = before != after == after_restart and losses[-1] < 0.1 * losses[0] and still_known
    sys.exit(0 if learned and memory.copied_bytes == 0 < memory.shared_bytes else 1)


def prepare() -> Path:
    """Writes the model anew, and forgets what an earlier demo learned."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.rmtree(STATE / "models", ignore_errors=True)
    if REAL:
        model = Path(shutil.copytree(REAL_MODEL, FOLDER / "model"))
        say(f"a copy of SmolLM2-135M-Instruct is in {model}")
    else:
        model = write_model(FOLDER / "model", small_qwen3())
        say(f"a small Qwen3 of random weights is in {model}")
    return model.absolute()


@contextmanager
def served(model: Path) -> Iterator[tuple[ApolloClient, int]]:
    """`apollo up` on the model, attached and answering, until the block ends."""
    port = free_port()
    log = (FOLDER / "up.log").open("ab")
    say(f"starting vLLM and the training server (their log: {log.name})")
    command = [sys.executable, "-m", "apollo_client.command", "up", str(model)]
    command += ["--port", str(port), "--max-model-len", "512"]
    command += [] if REAL else ["--dtype", "float32"]
    environment = os.environ | {"APOLLO_STATE_DIR": str(STATE), "VLLM_CPU_KVCACHE_SPACE": "1"}
    # Compiling this small model takes longer than all that the demo asks of it.
    process = subprocess.Popen(
        [*command, "--enforce-eager"], stdout=log, stderr=subprocess.STDOUT, env=environment
    )
    try:
        with ApolloClient(f"unix:{STATE}/training.sock") as client:
            wait_until_ready(process, client, port)
            yield client, port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def free_port() -> int:
    """A TCP port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(process: subprocess.Popen[bytes], client: ApolloClient, port: int) -> None:
    """Waits for the attachment and for vLLM's HTTP server."""
    deadline = time.monotonic() + START_SECONDS
    while not (attached(client) and serves(port)):
        if process.poll() is not None or time.monotonic() > deadline:
            log = (FOLDER / "up.log").read_text(errors="replace")
            sys.exit(log[-4000:] + "\ndemo: the services did not start; their log is above")
        time.sleep(0.5)
    status = client.status()
    say(
        f"attached: {status.weight_memory.parameters:,} parameters shared, "
        f"log-probabilities within {status.logprob_difference:.0e} nats of vLLM's"
    )


def attached(client: ApolloClient) -> bool:
    """Whether the training server holds vLLM's weights."""
    try:
        return client.status().attachment == status_pb2.ATTACHMENT_STATE_ATTACHED
    except Unavailable:
        return False


def serves(port: int) -> bool:
    """Whether vLLM's HTTP server is up."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def ask(model: Path, port: int, question: str = QUESTION) -> str:
    """vLLM's answer to a question, greedy."""
    body: dict[str, Any] = {
        "model": str(model),
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 32,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = str(json.load(response)["choices"][0]["message"]["content"])
    say(f"{question} {answer!r}")
    return answer


def learn(client: ApolloClient) -> list[float]:
    """Trains on the facts and returns the loss of each step."""
    facts = read_samples(FACTS)
    # Random weights know nothing that a loss near 0 could spoil: every step is taken.
    options = RunOptions(epochs=EPOCHS, samples_per_step=len(facts), lr=LEARNING_RATE, min_loss=0)
    return losses_of(client.train(facts, **options))


def teach(client: ApolloClient) -> list[float]:
    """The same as `apollo teach` does it: what the model says of other capitals must stay."""
    facts = [placed.value for placed in read_placed(CAPITALS, FACTS_FORM)]
    samples, options = lesson(facts)
    return losses_of(client.train(samples, **options))


def losses_of(events: Iterator[training_pb2.RunEvent]) -> list[float]:
    """The loss of each step; exits where the run fails."""
    losses = []
    for event in events:
        if event.HasField("step"):
            losses.append(event.step.loss)
            say(f"step {event.step.step:3}  loss {event.step.loss:.4f}")
        elif event.finished.HasField("failure"):
            sys.exit(f"demo: the run failed: {event.finished.failure.message}")
    return losses


def say(text: str) -> None:
    """One line for whoever watches."""
    print(f"demo: {text}", flush=True)


if __name__ == "__main__":
    main()
