"""Run as a process of its own: what the sidecar says of vLLM's own configurations, as JSON.

    python -m tests.vllm.read_configs MODEL_DIR MLA_MODEL_DIR

Each is made by vLLM from flags. What vLLM refuses to make without a GPU is set afterwards, on a
field that must be there by that name.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

from apollo_grpc.errors import FailedPrecondition
from apollo_sidecar.refusals import require_live_experts, require_shareable

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"enable_lora": True},
    "tensor parallel": {"tensor_parallel_size": 2},
    "pipeline parallel": {"pipeline_parallel_size": 2},
    "ngram drafts": {"speculative_config": NGRAM},
    "offload": {"cpu_offload_gb": 1},
}
FIELDS: dict[str, tuple[str, str, Any]] = {
    "quantised": ("model_config", "quantization", "fp8"),
    "gguf": ("model_config", "quantization", "gguf"),
    "sleep mode": ("model_config", "enable_sleep_mode", True),
    "moving experts": ("parallel_config", "enable_eplb", True),
}
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"}


def config_of(model: str, **flags: Any) -> Any:
    """vLLM's whole configuration."""
    return EngineArgs(
        model=model, dtype="float32", max_model_len=64, **flags
    ).create_engine_config()


def verdict(config: Any, environment: dict[str, str] | None = None) -> list[str]:
    """Reason and message, or nothing."""
    try:
        require_shareable(config, environment or {})
    except FailedPrecondition as error:
        return [error.reason, error.message]
    return []


def with_field(config: Any, part: str, name: str, value: Any) -> Any:
    """The configuration with one field changed; AttributeError where vLLM has no such field."""
    getattr(getattr(config, part), name)
    object.__setattr__(getattr(config, part), name, value)
    return config


def expert_verdicts() -> dict[str, bool]:
    """For each of vLLM's backends of unquantised experts, whether it is taken for live."""
    taken = {}
    for backend in UnquantizedMoeBackend:
        experts = torch.nn.Module()
        experts.quant_method = type("Method", (), {"unquantized_backend": backend})()
        try:
            require_live_experts(experts)
            taken[backend.name] = True
        except FailedPrecondition:
            taken[backend.name] = False
    return taken


def main(model: str, latent: str) -> None:
    """Prints one JSON object, the last line."""
    found = {name: verdict(config_of(model, **flags)) for name, flags in FLAGS.items()}
    drafts = {"model": model, "num_speculative_tokens": 2}
    found["drafts of a model"] = verdict(config_of(model, speculative_config=drafts))
    for name, field in FIELDS.items():
        found[name] = verdict(with_field(config_of(model), *field))
    found["latent attention"] = verdict(config_of(latent))
    on_gpu = with_field(config_of(model), "device_config", "device_type", "cuda")
    found["a GPU"] = verdict(on_gpu)
    found["expandable segments"] = verdict(on_gpu, EXPANDABLE)
    found["expandable segments on a CPU"] = verdict(config_of(model), EXPANDABLE)
    print(json.dumps({"verdicts": found, "experts": expert_verdicts()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
