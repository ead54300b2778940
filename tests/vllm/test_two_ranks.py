"""vLLM on two workers, and a trainer rank beside each: they map, train and answer as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from apollo_grpc.region import Region
from apollo_trainer.optim import Apollo
from apollo_trainer.parallel.parts import part_of
from apollo_trainer.parallel.ranks import ALONE, Ranks
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import take_step
from apollo_trainer.weights.attach import Checks, attach
from apollo_trainer.weights.sidecar import Sidecar
from apollo_trainer.weights.verify import log_probabilities
from tests.parallel.two_ranks import on_two_ranks
from tests.vllm.conftest import Stack

# `test_trainer_ranks.py` has one family through the server; here is each, number by number.
pytestmark = [pytest.mark.vllm, pytest.mark.long]
STEPS = 10
# Longer than a block, so that vLLM would show keys and values of older weights.
IDS = [(7 * i + 3) % 259 for i in range(150)]
SAMPLES = [
    TokenizedSample((5, 17, 200, 250, 9), (258, 3, 170, 40)),
    TokenizedSample((161, 2), (99, 159, 160), weight=2.0),
]


def trained(model: Any, regions: Any = None, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Losses, weights and state after some steps."""
    torch.set_num_threads(1)
    named = model.named_parameters()
    optimizer = Apollo(named, lr=3e-3, rank=16, seed=4, regions=regions or {}, ranks=ranks)
    optimizer.measure = True
    results = [take_step(model, optimizer, SAMPLES) for _ in range(STEPS)]
    return {
        "losses": [(r.loss, r.grad_norm, r.update_norm) for r in results],
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "state": optimizer.named_state()[0],
    }


def beside_vllm(ranks: Ranks, address: str) -> dict[str, Any]:
    """One rank: attaches, trains in vLLM's pause, and scores before and after."""
    sidecar = Sidecar(address)
    epoch = sidecar.manifest(ranks.rank).epoch
    attachment = attach(sidecar, epoch, checks=Checks(all_values=True), ranks=ranks)
    model, before = attachment.model, log_probabilities(attachment.model, IDS)
    digest = attachment.fingerprint()
    if ranks.rank == 0:
        sidecar.pause(epoch, "lease", 60)
    found = trained(model, attachment.regions, ranks)
    if ranks.rank == 0:
        sidecar.resume(epoch, "lease", weights_changed=True, updates=STEPS)
    found |= {
        "before": before,
        "after": log_probabilities(model, IDS),
        "digests": (digest, attachment.fingerprint()),
        "memory": (attachment.memory().shared_bytes, attachment.memory().copied_bytes),
        "difference": attachment.logprob_difference,
        "regions": {n: (r.root, r.runs) for n, r in attachment.regions.items()},
        "files": {n: attachment.checkpoint().read(n) for n in attachment.checkpoint().names()},
    }
    sidecar.close()
    return found


class Served:
    """What a family's engine and ranks said, and one process alone of the same directory."""

    def __init__(self, folder: Any, name: str):
        stack = Stack(folder, name)
        self.tolerance = stack.family.tolerance_nats
        model = AutoModelForCausalLM.from_pretrained(stack.model, dtype=torch.float32).eval()
        threads = {"VLLM_CPU_OMP_THREADS_BIND": f"{stack._cpu(0)}|{stack._cpu(1)}"}
        stack.start_vllm("--tensor-parallel-size", "2", **threads)
        try:
            stack.wait_serving()
            self.engine = [stack.engine_logprobs(IDS)]
            self.ranks = on_two_ranks(beside_vllm, f"unix:{stack.state}/sidecar.sock")
            self.engine.append(stack.engine_logprobs(IDS))
        finally:
            stack.end("vllm")
        self.alone = trained(model)


@pytest.fixture(scope="module", params=["qwen3", "llama", "qwen3_moe"])
def served(request: Any, tmp_path_factory: Any) -> Served:
    return Served(tmp_path_factory.mktemp("s"), request.param)


def test_both_sides_score_alike_before_and_after_training(served: Served) -> None:
    moved = (served.engine[0] - served.engine[1]).abs().max()
    assert moved > 0.5
    for rank in served.ranks:
        for ours, engine in zip((rank["before"], rank["after"]), served.engine, strict=True):
            assert (ours - engine).abs().max() < served.tolerance


def test_nothing_is_copied_and_both_have_half(served: Served) -> None:
    (first, copied), (second, also_copied) = (rank["memory"] for rank in served.ranks)
    whole = sum(weight.nbytes for weight in served.alone["weights"].values())
    assert copied == also_copied == 0
    assert max(first, second) < 0.7 * whole


def test_ten_steps_are_those_of_one_process(served: Served) -> None:
    for rank, found in enumerate(served.ranks):
        assert found["losses"] == [pytest.approx(e, rel=1e-4) for e in served.alone["losses"]]
        for name, weight in found["weights"].items():
            whole = served.alone["weights"][name]
            torch.testing.assert_close(weight, own_part(found, name, whole), rtol=1e-5, atol=1e-5)
        assert rank in (0, 1)


def test_a_rank_reads_whole_checkpoint_tensors(served: Served) -> None:
    for found in served.ranks:
        for name, value in found["files"].items():
            whole = served.alone["weights"].get(name)
            if whole is not None:
                torch.testing.assert_close(value, whole, rtol=1e-5, atol=1e-5)
    first, second = served.ranks
    assert first["digests"] == second["digests"]
    assert first["digests"][0] != first["digests"][1]


def own_part(found: Any, name: str, whole: torch.Tensor) -> torch.Tensor:
    return part_of(whole, Region(*found["regions"][name]))
