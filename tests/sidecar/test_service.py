"""WeightExportService over a real socket, on an engine client of vLLM's shape without vLLM."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from google.protobuf import duration_pb2

from apollo_grpc import process_state
from apollo_grpc.interceptors import SyncErrors
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_grpc.sidecar.v1 import weight_export_pb2_grpc as pb_grpc
from apollo_grpc.statuses import from_rpc_error
from apollo_grpc.transport import SERVER_OPTIONS, Endpoint, open_port
from apollo_sidecar import leases
from apollo_sidecar.answers import Answers
from apollo_sidecar.engine import Engine
from apollo_sidecar.generation import GenerationPage
from apollo_sidecar.others_pause import OthersPause
from apollo_sidecar.sample_tokens import SampleTokens
from apollo_sidecar.service import WeightExportService
from apollo_sidecar.vllm_prompts import VllmPrompts
from apollo_sidecar.weight_version import RESET_ATTEMPTS
from tests.waiting import HANG, wait_until


class Client:
    """Answers as AsyncLLM does (vllm/v1/engine/async_llm.py), and keeps what it was asked."""

    errored = False

    async def is_paused(self):
        while not self.answers_pings:
            await asyncio.sleep(0.01)
        return self.is_at_rest

    def __init__(self):
        self.asked: list[tuple[object, ...]] = []
        self.page = GenerationPage()
        manifest = pb.WeightManifest(model="m", generation=1, generation_page=self.page.handle())
        self.workers = [("", "", manifest.SerializeToString())]
        self.refused_resets = 0
        self.is_at_rest = False
        self.answers_pings = True

    async def pause_generation(self, *, mode: str, clear_cache: bool):
        self.is_at_rest = True
        self.asked.append(("pause", mode, clear_cache))

    async def resume_generation(self):
        self.asked.append(("resume",))
        self.is_at_rest = False

    async def reset_prefix_cache(self, *, reset_running_requests: bool):
        self.asked.append(("reset", reset_running_requests))
        self.refused_resets -= 1
        return self.refused_resets < 0

    async def collective_rpc(self, method: str, args: tuple[bytes, ...] = ()):
        self.asked.append((method, *args))
        return self.workers


class Served:
    """A sidecar on a unix socket, its engine on a loop of its own, and a stub to call it."""

    def __init__(self, folder: Path):
        self.client, self.loop = Client(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.engine = Engine(self.client, self.loop)
        pool = futures.ThreadPoolExecutor(4)
        self._server = grpc.server(pool, interceptors=[SyncErrors()], options=SERVER_OPTIONS)
        prompts = VllmPrompts(None)
        answers = Answers(self.engine, prompts)
        service = WeightExportService(self.engine, SampleTokens(prompts, self.loop), answers)
        pb_grpc.add_WeightExportServiceServicer_to_server(service, self._server)
        self._lock = open_port(self._server, f"unix:{folder}/s.sock")
        self._server.start()
        self._channel = Endpoint(f"unix:{folder}/s.sock").channel()
        self.stub = pb_grpc.WeightExportServiceStub(self._channel)
        self.epoch = self.engine.epoch

    def stop_loop(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(HANG)

    def close(self):
        self._channel.close()
        self._server.stop(None).wait()
        self.stop_loop()
        self.loop.close()

    def pause(self, request_id="a", seconds=30, **named):
        fields = {"epoch": self.epoch, "lease": duration_pb2.Duration(seconds=seconds)} | named
        return self.stub.Pause(pb.PauseRequest(request_id=request_id, **fields), timeout=HANG)

    def probe(self, lease_id="a", seconds=30, **named):
        fields = {"epoch": self.epoch, "lease": duration_pb2.Duration(seconds=seconds)} | named
        return self.stub.ProbeWeights(
            pb.ProbeWeightsRequest(lease_id=lease_id, **fields), timeout=HANG
        )

    def resume(self, lease_id="a", changed=False, **named):
        fields = {"epoch": self.epoch, "weights_changed": changed} | named
        request = pb.ResumeRequest(lease_id=lease_id, **fields)
        return self.stub.Resume(request, timeout=HANG)


@pytest.fixture
def sidecar():
    folder = Path(tempfile.mkdtemp(prefix="apollo-"))
    served = Served(folder)
    yield served
    served.close()
    shutil.rmtree(folder)


def failure(call, *args, **named):
    with pytest.raises(grpc.RpcError) as failed:
        call(*args, **named)
    return from_rpc_error(failed.value)


def test_the_manifest_carries_the_epoch_and_the_weight_version(sidecar):
    answer = sidecar.stub.GetWeightManifest(pb.GetWeightManifestRequest(), timeout=HANG)
    assert (answer.manifest.model, answer.manifest.epoch) == ("m", sidecar.epoch)
    assert answer.manifest.weight_version == 0
    sidecar.pause()
    sidecar.resume(changed=True)
    again = sidecar.stub.GetWeightManifest(pb.GetWeightManifestRequest(), timeout=HANG)
    assert again.manifest.weight_version == 1


def test_weights_count_as_loaded_until_the_first_pause(sidecar):
    def as_loaded():
        answer = sidecar.stub.GetWeightManifest(pb.GetWeightManifestRequest(), timeout=HANG)
        return answer.manifest.as_loaded

    assert as_loaded()
    sidecar.pause()
    assert not as_loaded(), "its holder may die before it says what it wrote"
    sidecar.resume(changed=False)
    assert not as_loaded()


def test_a_workers_refusal_arrives_with_its_reason(sidecar):
    sidecar.client.workers = [("WEIGHTS_NOT_SHARED", "no", b"")]
    error = failure(sidecar.stub.GetWeightManifest, pb.GetWeightManifestRequest(), timeout=HANG)
    assert (error.reason, error.message) == ("WEIGHTS_NOT_SHARED", "no")


def test_each_of_several_workers_has_its_own_manifest(sidecar):
    ranks = [pb.WeightManifest(tensor_parallel_rank=r, tensor_parallel_size=2) for r in (0, 1)]
    sidecar.client.workers = [("", "", each.SerializeToString()) for each in ranks]
    for rank in (0, 1):
        request = pb.GetWeightManifestRequest(tensor_parallel_rank=rank)
        found = sidecar.stub.GetWeightManifest(request, timeout=HANG).manifest
        assert (found.tensor_parallel_rank, found.epoch) == (rank, sidecar.epoch)
    for rank in (2, -1):
        request = pb.GetWeightManifestRequest(tensor_parallel_rank=rank)
        error = failure(sidecar.stub.GetWeightManifest, request, timeout=HANG)
        assert error.reason == "TENSOR_PARALLEL_UNSUPPORTED"


def test_what_any_worker_says_of_the_plan_is_in_the_answer(sidecar):
    def answer(rank, refused):
        found = pb.TraceCheckpointMapResponse(epoch=sidecar.epoch)
        found.views.add(name="w", rank=rank)
        found.refused.extend([pb.RefusedParameter(name=name, reason="no") for name in refused])
        return "", "", found.SerializeToString()

    sidecar.client.workers = [answer(0, ["a"]), answer(1, ["a", "b"])]
    request = pb.TraceCheckpointMapRequest(epoch=sidecar.epoch)
    found = sidecar.stub.TraceCheckpointMap(request, timeout=HANG)
    assert [view.rank for view in found.views] == [0, 1]
    assert [each.name for each in found.refused] == ["a", "b"]


def test_the_plan_reaches_the_worker_unchanged(sidecar):
    answer = pb.TraceCheckpointMapResponse(epoch=sidecar.epoch)
    sidecar.client.workers = [("", "", answer.SerializeToString())]
    request = pb.TraceCheckpointMapRequest(epoch=sidecar.epoch)
    request.roots.add(name="w", shape=(2, 3))
    assert sidecar.stub.TraceCheckpointMap(request, timeout=HANG) == answer
    method, sent = sidecar.client.asked[0]
    assert method == "apollo_trace"
    assert pb.TraceCheckpointMapRequest.FromString(sent) == request


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("TraceCheckpointMap", pb.TraceCheckpointMapRequest),
        ("ScoreTokens", pb.ScoreTokensRequest),
        ("AnswerPrompts", pb.AnswerPromptsRequest),
        ("Pause", pb.PauseRequest),
        ("Resume", pb.ResumeRequest),
        ("ProbeWeights", pb.ProbeWeightsRequest),
        ("ResetCaches", pb.ResetCachesRequest),
    ],
)
@pytest.mark.parametrize("epoch", ["", "of another process"])
def test_another_epoch_is_refused_before_the_engine_is_asked(sidecar, method, request_, epoch):
    error = failure(getattr(sidecar.stub, method), request_(epoch=epoch), timeout=HANG)
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert error.reason == "EPOCH_CHANGED"
    assert sidecar.client.asked == []


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("request_id", {"request_id": ""}),
        ("lease", {"seconds": 0}),
        ("lease", {"seconds": -1}),
        ("lease", {"seconds": 61}),
        ("lease", {"seconds": 2**62}),
        ("lease", {"lease": duration_pb2.Duration(seconds=60, nanos=1000)}),
        ("mode", {"mode": 99}),
    ],
)
def test_a_bad_pause_is_refused_by_field_and_pauses_nothing(sidecar, field, wrong):
    error = failure(sidecar.pause, **wrong)
    assert [v.field for v in error.violations] == [field]
    assert sidecar.client.asked == []


@pytest.mark.parametrize("tokens", [[], [5]])
def test_too_few_tokens_to_score_are_refused(sidecar, tokens):
    request = pb.ScoreTokensRequest(epoch=sidecar.epoch, token_ids=tokens)
    assert (
        failure(sidecar.stub.ScoreTokens, request, timeout=HANG).violations[0].field == "token_ids"
    )


def test_scoring_while_paused_is_refused_instead_of_waiting(sidecar):
    sidecar.pause()
    request = pb.ScoreTokensRequest(epoch=sidecar.epoch, token_ids=[1, 2, 3])
    error = failure(sidecar.stub.ScoreTokens, request, timeout=HANG)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "PAUSED")


@pytest.mark.parametrize(
    ("mode", "asked"),
    [
        (pb.PAUSE_MODE_UNSPECIFIED, "keep"),
        (pb.PAUSE_MODE_KEEP, "keep"),
        (pb.PAUSE_MODE_WAIT, "wait"),
        (pb.PAUSE_MODE_ABORT, "abort"),
    ],
)
def test_each_mode_is_vllms_own_and_leaves_the_cache_to_the_resume(sidecar, mode, asked):
    sidecar.pause(mode=mode)
    assert sidecar.client.asked == [("pause", asked, False), ("apollo_hold",)]


def test_a_pause_that_is_retried_returns_the_same_lease(sidecar):
    first, second = sidecar.pause(seconds=5), sidecar.pause(seconds=30)
    assert first.lease_id == second.lease_id == "a"
    assert 0 < first.remaining.ToTimedelta().total_seconds() <= 5
    assert 25 < second.remaining.ToTimedelta().total_seconds() <= 30
    assert sidecar.client.asked == [("pause", "keep", False), ("apollo_hold",)]
    assert failure(sidecar.pause, "b").reason == "LEASE_HELD"


def test_changed_weights_raise_the_version_and_reset_before_the_engine_goes_on(sidecar):
    sidecar.pause()
    assert sidecar.resume(changed=True).weight_version == 1
    assert sidecar.client.asked[2:] == [("reset", True), ("apollo_let_go",), ("resume",)]
    assert sidecar.resume(changed=True).weight_version == 1
    assert len(sidecar.client.asked) == 5


def test_unchanged_weights_keep_the_version_and_the_caches(sidecar):
    sidecar.pause()
    assert sidecar.resume(changed=False).weight_version == 0
    assert sidecar.client.asked[2:] == [("apollo_let_go",), ("resume",)]


def test_a_reset_that_vllm_refuses_is_tried_again(sidecar):
    sidecar.client.refused_resets = 2
    sidecar.stub.ResetCaches(pb.ResetCachesRequest(epoch=sidecar.epoch), timeout=HANG)
    assert sidecar.client.asked == [("reset", True)] * 3


def test_a_cache_that_is_not_reset_is_said_and_the_engine_goes_on(sidecar):
    sidecar.client.refused_resets = RESET_ATTEMPTS
    sidecar.pause()
    assert failure(sidecar.resume, changed=True).reason == "CACHE_NOT_RESET"
    assert sidecar.client.asked[-1] == ("resume",)
    sidecar.pause("b")


def test_a_watcher_is_told_the_generation_first_and_then_each_change(sidecar):
    watch = sidecar.stub.WatchGeneration(pb.WatchGenerationRequest(), timeout=HANG)
    assert next(watch).weight_version == 0
    sidecar.pause()
    sidecar.resume(changed=True)
    told = next(watch)
    assert (told.weight_version, told.epoch) == (1, sidecar.epoch)
    watch.cancel()


def test_a_watcher_is_told_that_vllm_gives_no_answer_and_by_which_process(sidecar):
    watch = sidecar.stub.WatchGeneration(pb.WatchGenerationRequest(), timeout=HANG)
    assert not next(watch).no_answer
    sidecar.pause()
    sidecar.client.answers_pings = False
    told = next(each for each in watch if each.no_answer)
    assert (told.pid, told.pid_namespace) == process_state.own()
    sidecar.client.answers_pings = True
    assert next(each for each in watch if not each.no_answer).epoch == sidecar.epoch
    watch.cancel()


def test_a_watch_ends_and_calls_fail_when_vllm_stops(sidecar):
    watch = sidecar.stub.WatchGeneration(pb.WatchGenerationRequest(), timeout=HANG)
    assert next(watch).weight_version == 0
    sidecar.stop_loop()
    assert list(watch) == []
    assert failure(sidecar.pause).reason == "ENGINE_STOPPING"


def test_an_engine_that_ends_while_it_is_asked_is_gone_and_no_mistake_of_ours(sidecar):
    class EngineDeadError(Exception):
        """As vllm.v1.engine.exceptions names it."""

    async def dies(method: str, args: tuple[bytes, ...] = ()):
        raise EngineDeadError()

    sidecar.client.collective_rpc = dies
    error = failure(sidecar.stub.GetWeightManifest, pb.GetWeightManifestRequest(), timeout=HANG)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_STOPPING")


# What a probe asks of vLLM: nobody's request runs, and the blocks it computes in are nobody's.
BEGUN = [("pause", "keep", False), ("apollo_hold",), ("reset", True)]


def methods(sidecar):
    return [asked[0] for asked in sidecar.client.asked]


def test_a_probe_pauses_once_and_puts_its_bytes_back_before_vllm_goes_on(sidecar):
    sidecar.probe()
    sidecar.probe()
    assert sidecar.client.asked[:3] == BEGUN
    assert methods(sidecar)[3:] == ["apollo_change", "apollo_probe"] * 2
    sidecar.resume()
    assert methods(sidecar)[7:] == ["apollo_put_back", "apollo_let_go", "resume"]
    sidecar.pause("b")
    sidecar.resume("b")
    assert "apollo_put_back" not in methods(sidecar)[9:], "there is nothing to put back"


def test_a_probe_writes_nothing_that_stays(sidecar):
    sidecar.probe()
    assert sidecar.resume(changed=False).weight_version == 0
    answer = sidecar.stub.GetWeightManifest(pb.GetWeightManifestRequest(), timeout=HANG)
    assert answer.manifest.as_loaded


def test_a_probe_whose_holder_is_gone_is_undone_when_its_lease_runs_out(sidecar, wait):
    sidecar.probe(lease=duration_pb2.Duration(nanos=100_000_000))
    wait(lambda: not sidecar.engine.leases.active, "the end of the lease")
    assert methods(sidecar)[5:] == ["apollo_put_back", "reset", "apollo_let_go", "resume"]
    assert failure(sidecar.probe).reason == "LEASE_ENDED"
    assert "apollo_probe" not in methods(sidecar)[6:]


def test_vllm_stays_paused_with_weights_that_could_not_be_put_back(sidecar):
    sidecar.probe()
    sidecar.client.workers = [("PROBE_NOT_UNDONE", "Restart vLLM.", b"")]
    assert failure(sidecar.resume).reason == "PROBE_NOT_UNDONE"
    assert "resume" not in methods(sidecar)


def test_a_put_back_that_fails_once_is_tried_again(sidecar):
    sidecar.probe()
    answers = [[("WORKER_BUSY", "no", b"")], *([("", "", b"")] for _ in range(2))]

    async def answer(method, args=()):
        sidecar.client.asked.append((method,))
        return answers.pop(0)

    sidecar.client.collective_rpc = answer
    sidecar.resume()
    assert methods(sidecar)[5:] == ["apollo_put_back", "apollo_put_back", "apollo_let_go", "resume"]


def test_a_probe_beside_another_lease_is_refused(sidecar):
    sidecar.pause("a")
    assert failure(sidecar.probe, "b").reason == "LEASE_HELD"
    assert "apollo_probe" not in methods(sidecar)


@pytest.mark.parametrize(
    ("field", "wrong"), [("lease_id", {"lease_id": ""}), ("lease", {"seconds": 61})]
)
def test_a_bad_probe_is_refused_by_field_and_pauses_nothing(sidecar, field, wrong):
    error = failure(sidecar.probe, **wrong)
    assert [v.field for v in error.violations] == [field]
    assert sidecar.client.asked == []


def test_an_api_server_that_takes_over_puts_back_what_the_one_before_probed(sidecar):
    inherited = Engine(sidecar.client, sidecar.loop, as_loaded=False)
    inherited.leases.acquire("inherited", 30, "keep")
    inherited.leases.release("inherited", 0)
    assert methods(sidecar)[-3:] == ["apollo_put_back", "apollo_let_go", "resume"]


SHORT = duration_pb2.Duration(nanos=10_000_000)


class StampedClient(Client):
    """Of a vLLM that stamps its answers with the version of its weights."""

    def __init__(self):
        super().__init__()
        self.fails: set[str] = set()

    async def update_weight_version(self, version: str):
        self._ask("stamp", version)

    async def resume_generation(self):
        self._ask("resume")
        self.is_at_rest = False

    def _ask(self, *what):
        self.asked.append(what)
        if what[0] in self.fails:
            raise RuntimeError(f"{what[0]} failed")


@pytest.fixture
def stamped(sidecar, monkeypatch):
    """The same sidecar on such a vLLM; what failed is tried again at once."""
    monkeypatch.setattr(leases, "RETRY_SECONDS", 0.01)
    sidecar.client = sidecar.engine.vllm.client = StampedClient()
    sidecar.engine._others = OthersPause(sidecar.client, lambda: sidecar.engine.paused)
    return sidecar


def test_a_version_that_cannot_be_stamped_leaves_no_stale_cache(stamped):
    stamped.client.fails = {"stamp"}
    stamped.pause()
    failure(stamped.resume, changed=True)
    assert methods(stamped)[2:6] == ["stamp", "reset", "apollo_let_go", "resume"]
    stamped.client.fails.clear()
    wait_until(lambda: stamped.client.asked.count(("stamp", "1")) > 1, "the stamp")


@pytest.mark.parametrize("dies", [False, True])
def test_an_engine_that_does_not_resume_is_asked_until_it_does(stamped, dies):
    stamped.client.fails = {"resume"}
    stamped.pause(**({"lease": SHORT} if dies else {}))
    if not dies:
        failure(stamped.resume, changed=True)
    wait_until(lambda: stamped.client.asked.count(("resume",)) > 2, "more attempts")
    request = pb.ScoreTokensRequest(epoch=stamped.epoch, token_ids=[1, 2, 3])
    assert failure(stamped.stub.ScoreTokens, request, timeout=HANG).reason == "PAUSED"
    stamped.client.fails.clear()
    wait_until(lambda: not stamped.engine.paused, "the resume")
    assert stamped.client.asked.count(("reset", True)) == 1
    assert stamped.engine.weight_version == 1


def test_a_cache_that_was_not_reset_is_reset_later(stamped):
    stamped.client.refused_resets = RESET_ATTEMPTS
    stamped.pause()
    assert failure(stamped.resume, changed=True).reason == "CACHE_NOT_RESET"
    wait_until(lambda: not stamped.engine._version._stale_caches, "the reset")


def without_pause(sidecar, name="a", **named):
    return sidecar.pause(name, mode=pb.PAUSE_MODE_NONE, **named)


def test_a_lease_without_a_pause_leaves_vllm_alone_and_is_told_of(sidecar):
    assert without_pause(sidecar).lease_id == "a"
    assert sidecar.client.asked == [("apollo_hold",)]
    assert not sidecar.engine.manifest().as_loaded, "its holder may die in its first write"
    assert failure(sidecar.pause, "b").reason == "LEASE_HELD"
    assert sidecar.resume().weight_version == 0
    assert ("resume",) not in sidecar.client.asked


def test_writes_without_a_pause_whose_writer_dies_are_counted_and_caches_dropped(sidecar):
    without_pause(sidecar, lease=SHORT)
    wait_until(lambda: not sidecar.engine.leases.active, "the end of the lease")
    assert methods(sidecar) == ["apollo_hold", "reset", "apollo_let_go"]
    assert sidecar.engine.weight_version == 1


def watch(sidecar, trainer):
    return sidecar.stub.WatchGeneration(pb.WatchGenerationRequest(trainer_id=trainer), timeout=HANG)


def test_an_engine_is_one_training_servers_until_that_one_goes(sidecar):
    first = watch(sidecar, "first")
    next(first)
    for call in (lambda: next(watch(sidecar, "second")), sidecar.pause):
        assert failure(call).reason == "ENGINE_HELD"
    assert failure(without_pause, sidecar, trainer_id="second").reason == "ENGINE_HELD"
    assert sidecar.client.asked == []
    sidecar.pause(trainer_id="first")
    sidecar.resume()

    # As after a connection that broke: the second watch keeps what the first one had.
    again = watch(sidecar, "first")
    next(again)
    first.cancel()
    wait_until(lambda: sidecar.engine.hold._watches == 1, "the end of the first watch")
    assert failure(lambda: next(watch(sidecar, "second"))).reason == "ENGINE_HELD"

    again.cancel()
    wait_until(lambda: sidecar.engine.hold._watches == 0, "the end of the last watch")
    second = watch(sidecar, "second")
    assert next(second).epoch == sidecar.epoch
    sidecar.pause("b", trainer_id="second")
    second.cancel()


def test_what_a_training_server_had_vllm_keep_is_dropped_once_it_is_gone(sidecar):
    """A killed one's next reset never comes; a wedged vLLM drops when it answers again."""
    trains = watch(sidecar, "first")
    next(trains)
    sidecar.pause(trainer_id="first")
    sidecar.resume(changed=True, keep_caches=True)
    assert "reset" not in methods(sidecar)
    sidecar.client.refused_resets = RESET_ATTEMPTS + 1
    trains.cancel()
    wait_until(lambda: sidecar.client.refused_resets < 0, "the reset that works")
    resets = methods(sidecar).count("reset")
    assert resets == RESET_ATTEMPTS + 2


def test_a_training_server_that_left_nothing_stale_goes_without_a_reset(sidecar):
    trains = watch(sidecar, "first")
    next(trains)
    sidecar.pause(trainer_id="first")
    sidecar.resume(changed=True)
    resets = methods(sidecar).count("reset")
    trains.cancel()
    wait_until(lambda: sidecar.engine.hold._watches == 0, "the end of the watch")
    sidecar.pause("b")
    sidecar.resume("b")
    assert methods(sidecar).count("reset") == resets == 1


def test_whoever_only_looks_holds_nothing(sidecar):
    looking = watch(sidecar, "")
    next(looking)
    trains = watch(sidecar, "first")
    assert next(trains).epoch == sidecar.epoch
    looking.cancel()
    trains.cancel()


def ask(sidecar, coroutine):
    """As somebody who uses vLLM's own routes on this API server."""
    return asyncio.run_coroutine_threadsafe(coroutine, sidecar.loop).result(HANG)


def pause_by_user(sidecar, mode="keep"):
    ask(sidecar, sidecar.client.pause_generation(mode=mode, clear_cache=False))


@pytest.mark.parametrize("heard", [True, False], ids=["here", "by another API server"])
@pytest.mark.parametrize("mode", [pb.PAUSE_MODE_KEEP, pb.PAUSE_MODE_NONE])
def test_a_users_pause_is_left_as_it_was_found(sidecar, mode, heard):
    if heard:
        pause_by_user(sidecar)
    sidecar.client.is_at_rest = True
    sidecar.pause(mode=mode)
    assert sidecar.resume(changed=True).weight_version == 1
    assert sidecar.client.is_at_rest
    assert "resume" not in methods(sidecar)
    ask(sidecar, sidecar.client.resume_generation())
    sidecar.pause("b")
    sidecar.resume("b")
    assert not sidecar.client.is_at_rest, "the next run's pause is the trainer's alone"


def test_a_user_who_pauses_in_mid_run_finds_vllm_paused_after_it(sidecar):
    sidecar.pause()
    pause_by_user(sidecar, "abort")
    sidecar.pause()
    sidecar.resume()
    assert sidecar.client.is_at_rest


@pytest.mark.parametrize("heard", [True, False], ids=["here", "by another API server"])
def test_a_renewal_tells_that_a_user_let_vllm_go_on(sidecar, heard):
    sidecar.pause()
    if heard:
        ask(sidecar, sidecar.client.resume_generation())
        pause_by_user(sidecar)
    else:
        sidecar.client.is_at_rest = False
    error = failure(sidecar.pause)
    assert error.reason == "LEASE_ENDED"
    assert "Somebody else let vLLM go on" in error.message
    assert not sidecar.engine.leases.active
    assert sidecar.engine.weight_version == 1, "what was written until then is told at once"
    assert ("reset", True) in sidecar.client.asked
    assert sidecar.client.is_at_rest == heard, "a pause that came after it is the user's"
    assert sidecar.resume(changed=True).weight_version == 2


def test_a_pause_that_lets_requests_finish_first_ends_that_of_a_run(sidecar):
    sidecar.pause()
    pause_by_user(sidecar, "wait")
    assert failure(sidecar.pause).reason == "LEASE_ENDED"
    assert sidecar.client.is_at_rest


def test_a_users_pause_that_failed_is_none(sidecar):
    with pytest.raises(TypeError):
        ask(sidecar, sidecar.client.pause_generation("keep"))
    sidecar.pause()
    sidecar.resume()
    assert not sidecar.client.is_at_rest


def test_scoring_while_a_user_pauses_vllm_is_refused_and_told_of(sidecar):
    looking = watch(sidecar, "")
    assert not next(looking).paused_by_others
    pause_by_user(sidecar)
    request = pb.ScoreTokensRequest(epoch=sidecar.epoch, token_ids=[1, 2, 3])
    error = failure(sidecar.stub.ScoreTokens, request, timeout=HANG)
    assert error.reason == "PAUSED_BY_OTHERS"
    assert "POST /resume" in error.message
    assert any(told.paused_by_others for told, _ in zip(looking, range(8), strict=False))
    # Through another API server, which nobody here hears of.
    sidecar.client.is_at_rest = False
    assert not all(told.paused_by_others for told, _ in zip(looking, range(8), strict=False))
    looking.cancel()


def test_watchers_and_the_manifest_tell_how_often_others_changed_the_weights(sidecar):
    looking = watch(sidecar, "")
    assert next(looking).generation == 0
    assert sidecar.engine.manifest().as_loaded
    sidecar.client.page.advance()
    assert any(told.generation == 2 for told, _ in zip(looking, range(8), strict=False))
    looking.cancel()
