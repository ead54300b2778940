"""Several API servers and one sidecar: who serves, who waits, and who is refused."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from apollo_grpc.errors import ApolloError, FailedPrecondition, InvalidArgument
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar import serving
from apollo_sidecar.other_writers import HELD
from apollo_trainer.weights.sidecar import Sidecar


class EngineCore:
    """What several API servers share: one scheduler, and the calls that reached it."""

    def __init__(self, engine_id: str):
        self.id, self.calls, self.paused, self.version = engine_id, [], False, "default"
        self.held = b""


class Client:
    """The calls of vLLM's AsyncLLM that serving uses, of one API server."""

    errored = False

    def __init__(self, core: EngineCore):
        self.core = core

    async def collective_rpc(self, method: str, args: tuple[bytes, ...] = ()) -> list[Any]:
        if method == "apollo_engine_id":
            return [self.core.id]
        if method == "apollo_manifest":
            return [("", "", pb.WeightManifest(worker_pid=os.getpid()).SerializeToString())]
        before, self.core.held = self.core.held, HELD if method == "apollo_hold" else b""
        return [("", "", before)]

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.core.paused = True

    async def resume_generation(self) -> None:
        self.core.calls.append("resume")
        self.core.paused = False

    async def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool:
        self.core.calls.append("reset caches")
        return True

    async def is_paused(self) -> bool:
        return self.core.paused

    async def update_weight_version(self, version: str) -> None:
        self.core.version = version

    async def get_weight_version(self) -> str:
        return self.core.version


@pytest.fixture(autouse=True)
def settings(monkeypatch, sidecar_address):
    monkeypatch.setenv("APOLLO_SIDECAR", sidecar_address)
    monkeypatch.setattr(serving, "SUCCESSION_SECONDS", 0.02)
    monkeypatch.setattr(serving, "OWNER_READ_SECONDS", 0.01)
    monkeypatch.setattr(serving, "INHERITED_PAUSE_SECONDS", 0.1)


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def manifest(address: str) -> pb.WeightManifest:
    return await asyncio.to_thread(Sidecar(address).manifest)


async def manifest_of_another(address: str, epoch: str) -> pb.WeightManifest:
    for _ in range(500):
        try:
            if (found := await manifest(address)).epoch != epoch:
                return found
        except ApolloError:
            pass
        await asyncio.sleep(0.02)
    pytest.fail("nobody took over")


async def test_one_api_server_serves_and_the_next_one_when_it_has_ended(sidecar_address):
    core = EngineCore("engine")
    first, second = [await serving.start(Client(core), None) for _ in range(2)]
    before = await manifest(sidecar_address)
    await asyncio.sleep(0.1)
    assert (await manifest(sidecar_address)).epoch == before.epoch
    assert before.as_loaded
    core.version = "7"
    await end(first)
    after = await manifest_of_another(sidecar_address, before.epoch)
    assert not after.as_loaded, "somebody may have trained these weights"
    assert after.weight_version == 8, "what was written without a pause was told to the first"
    assert core.calls == ["reset caches"], "nobody had paused the engine"
    await end(second)


async def test_a_pause_whose_sidecar_ended_is_ended_by_the_next_one(sidecar_address):
    core = EngineCore("engine")
    first, second = [await serving.start(Client(core), None) for _ in range(2)]
    before = await manifest(sidecar_address)
    core.paused, core.held = True, HELD
    await end(first)
    await manifest_of_another(sidecar_address, before.epoch)
    for _ in range(100):
        await asyncio.sleep(0.02)
        if not core.paused:
            break
    assert core.calls == ["reset caches", "resume"]
    assert core.held == b"", "others may change weights again"
    await end(second)


async def test_a_users_own_pause_is_left_by_an_api_server_that_takes_over(sidecar_address):
    core = EngineCore("engine")
    first, second = [await serving.start(Client(core), None) for _ in range(2)]
    before = await manifest(sidecar_address)
    core.paused = True
    await end(first)
    await manifest_of_another(sidecar_address, before.epoch)
    for _ in range(100):
        await asyncio.sleep(0.02)
        if core.calls:
            break
    assert core.calls == ["reset caches"]
    assert core.paused
    await end(second)


async def test_another_engine_at_the_same_address_is_refused_and_told_what_to_do(sidecar_address):
    first = await serving.start(Client(EngineCore("one")), None)
    before = await manifest(sidecar_address)
    with pytest.raises(FailedPrecondition, match="APOLLO_SIDECAR=unix:PATH") as refused:
        await serving.start(Client(EngineCore("two")), None)
    assert refused.value.reason == "SIDECAR_TAKEN"
    assert (await manifest(sidecar_address)).epoch == before.epoch
    await end(first)
    second = await serving.start(Client(EngineCore("two")), None)
    await end(second)


async def test_tcp_is_refused(monkeypatch):
    monkeypatch.setenv("APOLLO_SIDECAR", "127.0.0.1:1")
    with pytest.raises(InvalidArgument, match="unix:PATH"):
        await serving.start(Client(EngineCore("engine")), None)
