"""What callers can make the training server hold: its peak above a quiet server, by kind of call.

    python benchmarks/bench_bounds.py            # all of them
    python benchmarks/bench_bounds.py token runs # some

A server process beside an engine double, for `snapshots` of a model of 14 million parameters in
fp32 (56 MiB), whose copies for undo, which have a bound of their own, are off. The peak is the
kernel's VmHWM from when the callers begin until they have ended; the callers are threads of this
process.

    token      16 callers over TCP without a token, 57 MiB each
    snapshots  a run with a snapshot after each step, and 60 CreateSnapshot calls at one time
    runs       64 runs that wait, 2 million tokens each, sent by 16 callers at a time
    watchers   1,000 watchers, 20 of which read, and runs that tell 10,000 losses in an event
"""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
from transformers import Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apollo_client import ApolloClient
from apollo_grpc.errors import ApolloError
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import training_pb2 as pb
from examples.byte_model import small_qwen3, write_model
from tests import engine_double
from tests.server_process import ServerProcess, served

MIB = 2**20
LIMIT_MIB = 256


class Peak:
    """Resident memory of a process, from when this is made."""

    def __init__(self, pid: int):
        self._proc = Path(f"/proc/{pid}")
        (self._proc / "clear_refs").write_text("5")
        self._quiet = self._read("VmRSS")

    def _read(self, name: str) -> int:
        lines = (self._proc / "status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    def mib(self) -> float:
        """The peak above what there was at the beginning."""
        return (self._read("VmHWM") - self._quiet) / 1024


@contextmanager
def server(*, large: bool = False, **settings: str) -> Iterator[ServerProcess]:
    """An attached server that has trained once: what is loaded late is loaded."""
    config: Qwen3Config = small_qwen3()
    engine_double.MAX_MODEL_LEN = config.max_position_embeddings
    if large:
        config.hidden_size, config.intermediate_size = 512, 2048
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", config, seed=7)
        with served(model, **settings) as running:
            with ApolloClient(running.address) as client:
                list(client.train([("The sea is", " deep.")]))
            yield running


def measured(running: ServerProcess, act: Callable[[], None]) -> float:
    """MiB at the peak of `act` above the server before it."""
    assert running._process
    time.sleep(1.0)
    peak = Peak(running._process.pid)
    act()
    return peak.mib()


def together(count: int, call: Callable[[], object], calls: int) -> None:
    """So many callers at one time; all calls have ended when this returns."""
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(call) for _ in range(calls)]:
            future.result()


def token() -> float:
    """Messages that no server has to read."""
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        address = f"127.0.0.1:{chosen.getsockname()[1]}"
    large = pb.TrainRequest(request_id="x" * (57 * MIB)).SerializeToString()
    refused: list[grpc.StatusCode] = []

    def call() -> None:
        with Endpoint(address).channel() as channel:
            try:
                list(channel.unary_stream("/apollo.v1.TrainingService/Train")(large, timeout=60))
            except grpc.RpcError as error:
                refused.append(error.code())

    with tempfile.TemporaryDirectory(prefix="apollo-") as folder:
        running = ServerProcess(Path(folder), APOLLO_ADDRESS=address)
        running.start()
        try:
            with Endpoint(address).channel() as channel:
                grpc.channel_ready_future(channel).result(60)
            result = measured(running, lambda: together(16, call, 48))
        finally:
            running.end()
    assert set(refused) == {grpc.StatusCode.UNAUTHENTICATED}, set(refused)
    return result


def snapshots() -> float:
    """Copies of the weights and the state."""
    with ExitStack() as held:
        running = held.enter_context(
            server(large=True, APOLLO_SNAPSHOT_STEPS="1", APOLLO_UNDO_MEBIBYTES="0")
        )
        client = held.enter_context(ApolloClient(running.address))

        def act() -> None:
            list(client.train([("The sea is", " deep.")], epochs=30))
            together(60, client.create_snapshot, 60)

        return measured(running, act)


def runs() -> float:
    """Specs and token ids of runs that wait."""
    tokens = pb.TokenSample(context_ids=[60], continuation_ids=[200] * 200)
    spec = pb.RunSpec(samples=[pb.Sample(tokens=tokens)] * 10_000, dry_run=True)
    with server() as running, ExitStack() as held:
        client = held.enter_context(ApolloClient(running.address))
        next(client.train([("The sea is", " deep.")], epochs=100_000, dry_run=True))
        result = measured(running, lambda: together(16, lambda: next(client.train_spec(spec)), 64))
        assert client.status().queue_length == 64
        return result


def watchers() -> float:
    """Updates that wait for who does not read."""
    with server() as running, ExitStack() as held:
        clients = [held.enter_context(ApolloClient(running.address)) for _ in range(20)]

        def act() -> None:
            watching = [clients[i % 20].watch() for i in range(1000)]
            for each in watching:
                next(each)
            readers = [threading.Thread(target=read, args=[each]) for each in watching[:20]]
            for reader in readers:
                reader.start()
            for _ in range(4):
                samples = [("a", "b")] * 10_000
                list(clients[0].train(samples, samples_per_step=4096, evaluate=True, dry_run=True))
            for each in watching:
                each.close()
            for reader in readers:
                reader.join()

        return measured(running, act)


def read(watching: Iterator[object]) -> None:
    """Reads until the stream is left."""
    with suppress(ApolloError):
        for _ in watching:
            pass


KINDS: dict[str, Callable[[], float]] = {
    "token": token,
    "snapshots": snapshots,
    "runs": runs,
    "watchers": watchers,
}


def main() -> None:
    """Measures what is named, and fails where the server held too much."""
    above = []
    for name in sys.argv[1:] or KINDS:
        mib = KINDS[name]()
        print(f"{name:10} {mib:8.0f} MiB above the quiet server", flush=True)
        above += [name] if mib > LIMIT_MIB else []
    sys.exit(f"above {LIMIT_MIB} MiB: {', '.join(above)}" if above else None)


if __name__ == "__main__":
    main()
