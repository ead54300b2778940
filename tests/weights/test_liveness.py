"""A probe proves each kind of weight live, and finds the copy that an engine computes with."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig

from apollo_grpc.errors import FailedPrecondition, Unavailable
from apollo_trainer.weights import liveness
from apollo_trainer.weights.attach import Checks, attach
from apollo_trainer.weights.sidecar import Sidecar
from examples.byte_model import write_model
from tests.waiting import wait_until

LAYERS = "model.layers.*."
KINDS = {
    "model.embed_tokens.weight",
    "model.norm.weight",
    *(
        f"{LAYERS}{name}.weight"
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            *(f"self_attn.{part}" for part in ("q_norm", "k_norm")),
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    ),
}


@pytest.fixture
def sidecar(sidecar_address):
    connected = Sidecar(sidecar_address)
    yield connected
    connected.close()


@pytest.fixture
def probe(sidecar):
    """Attaches to an engine, with a probe, and returns what that found."""

    def attached(engine):
        return attach(sidecar, engine.engine.epoch).liveness

    return attached


def same_bytes(engine, before):
    return all(torch.equal(before[name], t) for name, t in engine.model.values().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_of_an_engine_that_copies_nothing_is_proven(start_engine, probe, dtype):
    engine = start_engine(dtype=dtype)
    before = engine.model.values()
    found = probe(engine)
    assert (set(found.proven), found.unproven) == (KINDS, [])
    assert same_bytes(engine, before)
    assert not engine.engine.leases.active
    assert engine.engine.weight_version == 0
    assert found.seconds < 2.0


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_kind_that_is_computed_with_from_a_copy_is_refused_by_its_name(start_engine, probe, kind):
    engine = start_engine(dtype=torch.bfloat16, keeps_copies=(kind,))
    before = engine.model.values()
    with pytest.raises(FailedPrecondition) as refused:
        probe(engine)
    assert refused.value.reason == "WEIGHTS_NOT_LIVE"
    assert f"written into {kind}:" in refused.value.message
    assert same_bytes(engine, before)
    assert not engine.engine.leases.active


def test_a_copy_of_one_layer_alone_is_found(start_engine, probe):
    engine = start_engine(keeps_copies=("model.layers.1.mlp.down_proj.weight",))
    with pytest.raises(FailedPrecondition, match=r"layers\.\*\.mlp\.down_proj"):
        probe(engine)


@pytest.fixture
def opt_folder(model_folder: Path) -> Path:
    """In place of the tiny model: one whose key biases cancel, as positions do not turn keys."""
    shutil.rmtree(model_folder)
    config = OPTConfig(
        vocab_size=259,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return write_model(model_folder, config, seed=7)


def test_a_vector_that_no_score_depends_on_is_named_and_not_passed(opt_folder, start_engine, probe):
    found = probe(start_engine())
    assert found.unproven == ["model.decoder.layers.*.self_attn.k_proj.bias"]
    assert "model.decoder.embed_positions.weight" in found.proven
    assert "k_proj.bias, of which that is unknown" in str(found)


def test_a_matrix_that_no_score_depends_on_is_refused(start_engine, model_folder, probe):
    engine = start_engine()
    with torch.no_grad():
        for layer in engine.model.module.model.layers:
            layer.mlp.down_proj.weight.zero_()
    # Nothing comes through a projection of zeros; what is behind it may be anything.
    sidecar = Sidecar(engine._address)
    with pytest.raises(FailedPrecondition) as refused:
        attach(sidecar, engine.engine.epoch, checks=Checks(values=False))
    sidecar.close()
    assert refused.value.reason == "LIVENESS_UNPROVEN"
    assert "gate_proj" in refused.value.message
    assert "--no-probe-weights" in refused.value.message


def little_of_gates(engine):
    """What comes through an MLP is small beside rounding, whatever its gates are."""
    with torch.no_grad():
        for layer in engine.model.module.model.layers:
            layer.mlp.up_proj.weight.mul_(3e-4)


def test_a_matrix_that_does_little_is_proven_by_larger_changes(start_engine, sidecar, monkeypatch):
    engine = start_engine(dtype=torch.bfloat16)
    little_of_gates(engine)
    found = attach(sidecar, engine.engine.epoch, checks=Checks(values=False)).liveness
    assert set(found.proven) == KINDS
    monkeypatch.setattr(liveness, "LAST_STRENGTHS", ())
    with pytest.raises(FailedPrecondition, match=r"_proj\.weight moves the model's"):
        attach(sidecar, engine.engine.epoch, checks=Checks(values=False))


def test_a_copy_of_a_matrix_that_does_little_is_refused(start_engine, sidecar):
    gates = f"{LAYERS}mlp.gate_proj.weight"
    engine = start_engine(dtype=torch.bfloat16, keeps_copies=(gates,))
    little_of_gates(engine)
    with pytest.raises(FailedPrecondition, match=f"written into {re.escape(gates)}:"):
        attach(sidecar, engine.engine.epoch, checks=Checks(values=False))


def test_few_bytes_are_changed(start_engine, probe, monkeypatch):
    engine, changed = start_engine(), []
    monkeypatch.setattr(
        engine.client,
        "on_probe",
        lambda number: changed.append(sum(old.nbytes for _, old in engine.client.changed._kept)),
    )
    probe(engine)
    whole = sum(t.nbytes for t in engine.model.values().values())
    assert 0 < max(changed) < whole / 4


def test_bytes_that_are_not_put_back_are_noticed(start_engine, probe, monkeypatch):
    engine = start_engine()
    monkeypatch.setattr(engine.client.changed, "put_back", lambda: None)
    with pytest.raises(FailedPrecondition) as refused:
        probe(engine)
    assert refused.value.reason in ("PROBE_NOT_UNDONE", "WEIGHTS_NOT_LIVE")


@pytest.mark.parametrize("reason", ["LEASE_HELD", "LEASE_ENDED", "SCORE_FIRST"])
def test_what_passes_is_tried_again_and_refuses_nothing(start_engine, sidecar, monkeypatch, reason):
    engine = start_engine()

    def fail(*arguments):
        raise FailedPrecondition("busy", reason=reason)

    monkeypatch.setattr(sidecar, "probe", fail)
    with pytest.raises(Unavailable, match="busy"):
        attach(sidecar, engine.engine.epoch)


def test_a_pause_that_ran_out_proves_nothing(start_engine, sidecar):
    engine = start_engine(keeps_copies=("*mlp*",))
    before = engine.model.values()
    engine.client.on_probe = lambda number: time.sleep(1.0 if number == 1 else 0.0)
    with pytest.raises(Unavailable, match="lease_seconds"):
        attach(sidecar, engine.engine.epoch, checks=Checks(lease_seconds=1e-3))
    assert same_bytes(engine, before)


def test_a_pause_is_as_long_as_a_slow_model_needs_it(start_engine, sidecar, monkeypatch):
    compute = liveness.log_probabilities

    def slowly(model, token_ids):
        time.sleep(0.1)
        return compute(model, token_ids)

    monkeypatch.setattr(liveness, "log_probabilities", slowly)
    engine = start_engine()
    engine.client.on_probe = lambda number: time.sleep(0.2)
    found = attach(sidecar, engine.engine.epoch, checks=Checks(lease_seconds=0.05)).liveness
    assert set(found.proven) == KINDS


def test_without_the_probe_nothing_is_paused(start_engine, sidecar):
    engine = start_engine(keeps_copies=("*mlp*",))
    assert attach(sidecar, engine.engine.epoch, checks=Checks(liveness=False)).liveness is None
    assert engine.calls == []


class Killed(BaseException):
    """Nothing runs after it, no `finally` either: the calls of a killed process stay away."""


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("call", range(1, len(KINDS) + 3))
def test_a_trainer_that_dies_at_any_call_leaves_the_weights_as_they_were(
    start_engine, sidecar, monkeypatch, call, answered
):
    engine, calls, probing = start_engine(), [], sidecar.probe
    before, went_on = engine.model.values(), []

    def probe_until_killed(*arguments):
        calls.append(arguments)
        if len(calls) == call and not answered:
            raise Killed
        scores = probing(*arguments)
        if len(calls) == call:
            raise Killed
        return scores

    def gone(*arguments, **named):
        raise Unavailable("killed")

    def resume():
        went_on.append(same_bytes(engine, before))

    monkeypatch.setattr(sidecar, "probe", probe_until_killed)
    monkeypatch.setattr(sidecar, "resume", gone)
    engine.client.before["resume_generation"] = resume
    try:
        attach(sidecar, engine.engine.epoch)
        assert call > len(KINDS) + 1, "it ended without being killed"
    except Killed:
        made = call if answered else call - 1
        # The last call puts back what the one before changed.
        assert same_bytes(engine, before) == (made in (0, len(KINDS) + 1))
    leases, lease_id = engine.engine.leases, calls[0][1]
    if leases.active:
        leases.acquire(lease_id, 1e-3, "keep")
        wait_until(lambda: went_on, "the end of the lease")
    assert went_on in ([], [True]), "vLLM went on with changed weights"
    assert bool(went_on) == (call > 1 or answered)
    assert same_bytes(engine, before)
