"""What 1,000 watchers cost a run: the same runs with and without them, in turn.

    python benchmarks/bench_watchers.py [--watchers 1000] [--pairs 6] [--steps 20]

A server process beside an engine double trains a model of 31 million parameters on one thread, so
that a core is left for the event loop. The watchers are another process; two thirds of them read
all that comes, a third reads one message and no more. A run's time is from `started` to `finished`,
as the server stamps its events; the processor time more is the server's, for the watchers' coming
and going too. At last events are published to as many watchers within one process, a third of whom
never read: what that takes of the thread that publishes.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import grpc.aio
from transformers import Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apollo_client import ApolloClient
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine import StatusBoard
from apollo_trainer.watching import Ring
from examples.byte_model import small_qwen3, write_model
from tests import engine_double
from tests.server_process import ServerProcess, served

CHANNELS = 20
PUBLISHED, PUBLISH_SECONDS = 200, 0.05


async def publishing(count: int) -> None:
    """Prints what it takes of a thread to publish an event to so many watchers."""
    board = StatusBoard("bench", "")
    ring = Ring(board)
    watchers = [ring.subscribe() for _ in range(count)]

    async def follow(watcher: Any) -> None:
        while True:
            while watcher.take():
                pass
            await ring.grown()

    tasks = [asyncio.create_task(follow(each)) for i, each in enumerate(watchers) if i % 3]
    took = list[tuple[float, float]]()

    def publish() -> None:
        for number in range(PUBLISHED):
            event = pb.RunEvent(run_id="bench", sequence=number + 1, step=pb.RunEvent.Step(loss=1))
            began, busy = time.perf_counter(), time.thread_time()
            board.publish(event)
            took.append((time.perf_counter() - began, time.thread_time() - busy))
            time.sleep(PUBLISH_SECONDS)

    publisher = threading.Thread(target=publish)
    publisher.start()
    await asyncio.to_thread(publisher.join)
    for task in tasks:
        task.cancel()
    clock, busy = (sorted(1e3 * each for each in column) for column in zip(*took, strict=True))
    at = int(0.99 * (PUBLISHED - 1))
    print(
        f"an event is published to {count} watchers in {statistics.median(busy):.3f} ms of the "
        f"thread (99 of 100 within {busy[at]:.3f}), {statistics.median(clock):.3f} by the clock"
    )


async def watch(address: str, count: int, ready: Event, stop: Event, read_by_all: Any) -> None:
    """Watches until told to stop; every third one reads its first message alone."""
    channels = [Endpoint(address).aio_channel() for _ in range(CHANNELS)]
    request = status_pb2.WatchStatusRequest().SerializeToString()
    calls = [
        # Without a deserializer: the watchers' own work is no part of what is measured.
        channels[i % CHANNELS].unary_stream("/apollo.v1.StatusService/WatchStatus")(request)
        for i in range(count)
    ]
    for call in calls:
        await call.read()
    readers = [asyncio.create_task(read(c)) for i, c in enumerate(calls) if i % 3]
    ready.set()
    await asyncio.to_thread(stop.wait)
    for call in calls:
        call.cancel()
    got = await asyncio.gather(*readers)
    read_by_all.value = sum(got)
    for channel in channels:
        await channel.close()


async def read(call: Any) -> int:
    """Reads until the end; returns how many there were."""
    count = 0
    try:
        while await call.read() is not grpc.aio.EOF:
            count += 1
    except (grpc.RpcError, asyncio.CancelledError):
        pass
    return count


def watching(address: str, count: int, ready: Event, stop: Event, read_by_all: Any) -> None:
    """The watchers' process."""
    asyncio.run(watch(address, count, ready, stop, read_by_all))


def seconds_of_cores(server: ServerProcess) -> float:
    """Processor time of the server so far."""
    assert server._process
    fields = Path(f"/proc/{server._process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(client: ApolloClient, steps: int) -> float:
    """Seconds of one run."""
    ids = [60 + i % 190 for i in range(400)]
    tokens = pb.TokenSample(context_ids=ids[:80], continuation_ids=ids[80:])
    spec = pb.RunSpec(samples=[pb.Sample(tokens=tokens)] * 2, samples_per_step=2, epochs=steps)
    times = {}
    for event in client.train_spec(spec):
        times[event.WhichOneof("event")] = event.event_time.ToNanoseconds()
    return float(times["finished"] - times["started"]) / 1e9


def watched(client: ApolloClient, address: str, count: int, steps: int) -> tuple[float, int]:
    """The same while so many watch, and how many messages they read."""
    spawn = multiprocessing.get_context("spawn")
    ready, stop, read_by_all = spawn.Event(), spawn.Event(), spawn.Value("q", 0)
    others = spawn.Process(target=watching, args=[address, count, ready, stop, read_by_all])
    others.start()
    ready.wait()
    try:
        seconds = run(client, steps)
    finally:
        stop.set()
        others.join()
    return seconds, read_by_all.value


def main() -> None:
    """Prints each pair, and the median of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--watchers", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    engine_double.MAX_MODEL_LEN = 512
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        config: Qwen3Config = small_qwen3()
        config.hidden_size, config.intermediate_size = 768, 3072
        model = write_model(Path(folder) / "model", config, seed=7)
        # Undo encodes on the other core, which is the event loop's here.
        with (
            served(model, APOLLO_UNDO_MEBIBYTES="0") as server,
            ApolloClient(server.address) as client,
        ):
            run(client, 5)
            for pair in range(asked.pairs):
                times, cores, messages = {}, {}, 0
                # The order in turn: the second of a pair meets another machine than the first.
                for with_them in (pair % 2 == 0, pair % 2 == 1):
                    began = seconds_of_cores(server)
                    if with_them:
                        told = watched(client, server.address, asked.watchers, asked.steps)
                        times[with_them], messages = told
                    else:
                        times[with_them] = run(client, asked.steps)
                    cores[with_them] = seconds_of_cores(server) - began
                ratios.append(times[True] / times[False])
                print(
                    f"{1e3 * times[False] / asked.steps:7.1f} ms a step alone, "
                    f"{1e3 * times[True] / asked.steps:7.1f} ms watched: {ratios[-1] - 1:+.2%}; "
                    f"{1e6 * (cores[True] - cores[False]) / messages:.0f} us of a core more for "
                    f"each of {messages} messages read",
                    flush=True,
                )
    print(f"median {statistics.median(ratios) - 1:+.2%} of {len(ratios)} pairs")
    asyncio.run(publishing(asked.watchers))


if __name__ == "__main__":
    main()
