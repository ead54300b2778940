"""Ways to run vLLM in which weights cannot be shared, or are not what it computes with.

Each is refused by the name of the flag that brought it about: mapped all the same, such weights
would be trained without effect, or read and written where they no longer are.

Read in vLLM 0.26 and 0.32: config/{model,parallel,lora,offload}.py, model_executor/layers/
fused_moe/unquantized_fused_moe_method.py and its oracle; in 0.32 also model_executor/layers/
attention/mla_attention.py and v1/attention/backends/mla/{cpu,amx}_mla.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from apollo_grpc.errors import FailedPrecondition

# Experts whose weights stay as loaded; other backends swap halves or shuffle blocks in silence.
LIVE_EXPERT_BACKENDS = frozenset({"TRITON", "BATCHED_TRITON", "CPU"})
# Drafts without weights of their own.
WEIGHTLESS_DRAFTS = frozenset({"ngram", "ngram_gpu", "suffix"})
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_OTHERWISE_PARALLEL = ("pipeline_parallel_size", "data_parallel_size")


@dataclass(frozen=True)
class _Refusal:
    """A reason, what in vLLM's configuration brings it about, and what the user reads."""

    reason: str
    applies: Callable[[Any], Any]
    why: str


_REFUSALS = (
    _Refusal(
        "TENSOR_PARALLEL_UNSUPPORTED",
        lambda c: any(getattr(c.parallel_config, size, 1) != 1 for size in _OTHERWISE_PARALLEL),
        "its layers or copies of it are on several workers (--pipeline-parallel-size or "
        "--data-parallel-size); this version trains models that --tensor-parallel-size divides",
    ),
    _Refusal(
        "QUANTIZED",
        lambda c: "gguf" in (c.model_config.quantization, c.load_config.load_format),
        "the weights are GGUF, whose blocks are quantised; serve safetensors made of it "
        "(transformers: from_pretrained(FOLDER, gguf_file=NAME), then save_pretrained)",
    ),
    _Refusal(
        "QUANTIZED",
        lambda c: c.model_config.quantization,
        "the weights are quantised (--quantization, or by the model's own config), which repacks "
        "them; serve an unquantised model",
    ),
    _Refusal(
        "SLEEP_MODE",
        lambda c: getattr(c.model_config, "enable_sleep_mode", False),
        "--enable-sleep-mode puts the weights into memory of the cumem allocator, which cannot be "
        "shared; start vLLM without it",
    ),
    _Refusal(
        "LORA_ENABLED",
        lambda c: c.lora_config is not None,
        "--enable-lora wraps the layers, so that weights are no longer found by their names; "
        "start vLLM without it",
    ),
    _Refusal(
        "SPECULATIVE_DRAFT",
        lambda c: c.speculative_config and c.speculative_config.method not in WEIGHTLESS_DRAFTS,
        "--speculative-config drafts with a model that would not learn; drafts without weights, "
        "such as ngram, can be used",
    ),
    _Refusal(
        "EXPERTS_MOVED",
        lambda c: getattr(c.parallel_config, "enable_eplb", False),
        "--enable-eplb moves experts while serving; start vLLM without it",
    ),
    _Refusal(
        "WEIGHTS_OFFLOADED",
        lambda c: _offloads(getattr(c, "offload_config", None)),
        "offloading (--cpu-offload-gb, --offload-group-size) keeps weights elsewhere; start vLLM "
        "without it",
    ),
)


def _offloads(config: Any) -> bool:
    uva, prefetch = getattr(config, "uva", None), getattr(config, "prefetch", None)
    return bool(getattr(uva, "cpu_offload_gb", 0) or getattr(prefetch, "offload_group_size", 0))


def require_shareable(config: Any, environment: Mapping[str, str] = os.environ) -> None:
    """Checks the whole configuration, before the model is loaded.

    Args:
        config: vllm.config.VllmConfig.

    Raises FailedPrecondition with the reason and the flag.
    """
    for refusal in _REFUSALS:
        if refusal.applies(config):
            raise FailedPrecondition(refusal.why, reason=refusal.reason)
    # The allocator's options mean nothing to a CPU's weights.
    for variable in _ALLOCATOR_VARIABLES if config.device_config.device_type == "cuda" else ():
        if "expandable_segments:true" in environment.get(variable, "").lower():
            raise FailedPrecondition(
                f"{variable} asks for expandable_segments, whose memory CUDA cannot share; start "
                "vLLM without that option",
                reason="EXPANDABLE_SEGMENTS",
            )


def require_live_experts(model: torch.nn.Module) -> None:
    """Raises FailedPrecondition where experts are computed from weights in another layout."""
    for name, module in model.named_modules():
        backend = getattr(getattr(module, "quant_method", None), "unquantized_backend", None)
        if backend is not None and backend.name not in LIVE_EXPERT_BACKENDS:
            raise FailedPrecondition(
                f"the experts {name} are computed by {backend.name}, which rearranges their "
                "weights; start vLLM with --moe-backend triton",
                reason="EXPERTS_REARRANGED",
            )


def require_live_latents(model: torch.nn.Module, config: Any) -> None:
    """Checks latent attention (MLA), after the weights have moved for the last time.

    What is decoded is multiplied by W_UK_T and W_UV, which vLLM makes of kv_b_proj as it loads:
    views of its memory, but for backends that pack them. Prompts are multiplied by kv_b_proj
    itself, so that no score of a prompt would tell of a copy.

    Args:
        config: vllm.config.VllmConfig.

    Raises FailedPrecondition where they are no views, or attention is sparse as well.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "kv_b_proj") and hasattr(module, "impl")
    ]
    for name, layer in layers:
        if getattr(layer.impl, "is_sparse", False):
            raise _latent_refusal(
                f"{name} attends to the tokens that an indexer picks, which this version does not "
                "train; a model without one can be trained"
            )
        weight = getattr(layer.kv_b_proj, "weight", None)
        if not all(_lies_in(getattr(layer, m, None), weight) for m in ("W_UK_T", "W_UV")):
            raise _latent_refusal(
                f"{name} decodes with copies of kv_b_proj, which would not learn; start vLLM with "
                "another --attention-backend, on a CPU with CPU_MLA"
            )
    if getattr(config.model_config, "use_mla", False) and not layers:
        raise _latent_refusal("its layers are of a kind that this version does not know")


def _lies_in(matrix: Any, weight: Any) -> bool:
    """Whether all bytes of one tensor are of the other; by storages all of a memfd's would be."""
    if not isinstance(matrix, torch.Tensor) or not isinstance(weight, torch.Tensor):
        return False
    low, high = _span(weight)
    start, end = _span(matrix)
    return bool(matrix.numel()) and low <= start and end <= high


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Address of its first byte, and one past the last."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def _latent_refusal(why: str) -> FailedPrecondition:
    return FailedPrecondition(f"latent attention (MLA): {why}", reason="LATENT_ATTENTION")


def device_of(model: torch.nn.Module) -> str:
    """The kind of device that holds all weights, as torch names it.

    Raises FailedPrecondition where they lie on several, or on one that cannot be shared.
    """
    devices = {str(parameter.device) for parameter in model.parameters() if not parameter.is_meta}
    kinds = {device.partition(":")[0] for device in devices}
    if len(devices) != 1 or not kinds <= {"cpu", "cuda"}:
        raise FailedPrecondition(
            f"the weights lie on {', '.join(sorted(devices)) or 'no device'}; those on one CPU or "
            "one NVIDIA GPU can be shared",
            reason="DEVICE_UNSUPPORTED",
        )
    return kinds.pop()
