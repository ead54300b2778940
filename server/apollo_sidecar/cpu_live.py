"""Keeps vLLM's CPU weights live: what is computed with is what lies in the parameters.

On CPU, vLLM packs most weights after loading and computes with the packed copies, so a write to a
parameter changes nothing. No flag turns that off; these replacements do. They are made before the
model is loaded, in the worker, and only where VLLM_PLUGINS names this plugin.

Read in vLLM 0.26, 0.32 and 0.33, below model_executor/layers: utils.py, fused_moe/experts/
cpu_moe.py, fused_moe/cpu_fused_moe.py (0.26), mamba/ops/cpu/gdn_attention.py. What a release does
not have is left out.
"""

from __future__ import annotations

import importlib
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

_PATCHED = "_apollo_patched"
_ACTIVATION = "_apollo_activation"
Gate = Callable[[torch.Tensor], torch.Tensor]


def halves(activation: Gate) -> Gate:
    """[T, 2I] to [T, I]: the first half gates the second."""

    def gate(both: torch.Tensor) -> torch.Tensor:
        first, second = both.chunk(2, -1)
        return activation(first) * second

    return gate


def interleaved_swiglu(both: torch.Tensor) -> torch.Tensor:
    """[T, 2I] to [T, I], gates and values by turns, as in GPT-OSS.

    Source: swigluoai_and_mul of vLLM (model_executor/layers/fused_moe/activation.py).
    """
    gate = both[..., ::2].clamp(max=7.0)
    value = both[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (value + 1)


_ACTIVATIONS: dict[str, Gate] = {
    "silu": halves(F.silu),
    "gelu": halves(F.gelu),
    "gelu_tanh": halves(lambda x: F.gelu(x, approximate="tanh")),
    "swigluoai": interleaved_swiglu,
}


def keep_cpu_weights_live() -> None:
    """Replaces vLLM's packing of linear, expert and convolution weights. Idempotent."""
    _keep_linear_weights()
    _keep_expert_weights()
    _keep_fused_expert_weights()
    _keep_convolution_weights()


def _keep_linear_weights() -> None:
    utils: Any = importlib.import_module("vllm.model_executor.layers.utils")

    def dispatch_live_gemm(layer: Any, remove_weight: bool) -> None:
        # Weights of other ranks belong to convolutions and experts, which have paths of their own.
        if layer.weight.ndim == 2:
            layer.cpu_linear = F.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch_live_gemm


def _keep_expert_weights() -> None:
    module = _import_if_there("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
    base = getattr(module, "CPUUnquantizedExperts", None)
    if base is None or hasattr(base, _PATCHED):
        return
    for experts in (base, *base.__subclasses__()):
        if process := experts.__dict__.get("process_weights_after_loading"):
            experts.process_weights_after_loading = _live_process(process)
        if apply := experts.__dict__.get("apply"):
            experts.apply = _live_apply(apply)
    setattr(base, _PATCHED, True)


def _live_process(pack: Any) -> Any:
    def process_weights_after_loading(self: Any, layer: torch.nn.Module) -> None:
        activation = str(self.moe_config.activation.value).lower()
        if activation not in _ACTIVATIONS:
            # Packed as vLLM wants it: the model serves, and the training server refuses the map.
            pack(self, layer)
            return
        setattr(self, _ACTIVATION, _ACTIVATIONS[activation])

    return process_weights_after_loading


def _live_apply(packed_apply: Any) -> Any:
    def apply(
        self: Any,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *rest: Any,
        **named: Any,
    ) -> None:
        activation = getattr(self, _ACTIVATION, None)
        if activation is None:
            packed_apply(
                self, output, hidden_states, w1, w2, topk_weights, topk_ids, *rest, **named
            )
            return
        # The last argument says whether the router's weight was applied to the input already.
        weighted = named.get("apply_router_weight_on_input", rest[-1] if rest else False)
        scale = torch.ones_like(topk_weights) if weighted else topk_weights
        biases = (self.w1_bias, self.w2_bias)
        output.copy_(mix_experts(hidden_states, (w1, w2), biases, (scale, topk_ids), activation))

    return apply


def mix_experts(
    hidden: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    routing: tuple[torch.Tensor, torch.Tensor],
    activation: Gate,
) -> torch.Tensor:
    """Gated experts from the raw weights.

    hidden [T, H]; weights w13 [E, 2I, H] and w2 [E, H, I]; biases [E, 2I] and [E, H] or None;
    routing: factors and expert ids, both [T, K]; activation: [T, 2I] to [T, I]. Returns [T, H] in
    fp32.
    """
    (w13, w2), (bias13, bias2), (scale, expert_ids) = weights, biases, routing
    mixed = torch.zeros(hidden.shape, dtype=torch.float32)
    for expert in range(w13.shape[0]):
        token, slot = (expert_ids == expert).nonzero(as_tuple=True)
        if not token.numel():
            continue
        up = F.linear(hidden[token], w13[expert], None if bias13 is None else bias13[expert])
        out = F.linear(activation(up), w2[expert], None if bias2 is None else bias2[expert])
        mixed.index_add_(0, token, out.float() * scale[token, slot, None].float())
    return mixed


def _keep_fused_expert_weights() -> None:
    """Makes the CPU experts of older releases take their path expert by expert, over live weights.

    Their own path of that kind keeps slices of the weights, which stay behind when those move.
    """
    module = _import_if_there("vllm.model_executor.layers.fused_moe.cpu_fused_moe")
    fused = getattr(module, "CPUFusedMOE", None)
    if fused is None or not hasattr(fused, "init_moe_torch"):
        return

    def init_moe_live(self: Any, layer: Any) -> None:
        experts = range(layer.w13_weight.shape[0])
        layer.gate_up_linear = [live_linear(layer, "w13", expert) for expert in experts]
        layer.down_linear = [live_linear(layer, "w2", expert) for expert in experts]
        module._CPU_MOE_LAYER_CACHE[id(layer)] = weakref.ref(layer)

    fused.init_moe_torch = init_moe_live
    fused.check_grouped_gemm = lambda self, layer: (False, "none")
    # Otherwise the weights are packed before this class is asked (VLLM_CPU_SGL_KERNEL).
    utils: Any = importlib.import_module("vllm.model_executor.layers.utils")
    utils.check_cpu_sgl_kernel = lambda n, k, dtype: False


def live_linear(
    layer: torch.nn.Module, name: str, expert: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product of [T, K] with an expert's [N, K] of `<name>_weight` [E, N, K], as it is then."""

    def multiply(x: torch.Tensor) -> torch.Tensor:
        bias = getattr(layer, f"{name}_bias", None)
        weight = getattr(layer, f"{name}_weight")
        return F.linear(x, weight[expert], None if bias is None else bias[expert])

    return multiply


def _keep_convolution_weights() -> None:
    """Makes the gated delta net take its path over raw convolution weights.

    Only this module's view of `torch` is changed: with `torch.cpu` itself patched the process
    aborts in other kernels.
    """
    module = _import_if_there("vllm.model_executor.layers.mamba.ops.cpu.gdn_attention")
    if module is None or not isinstance(getattr(module, "torch", None), types.ModuleType):
        return

    class _NoBf16Kernels:
        def __getattr__(self, name: str) -> Any:
            if name == "_is_avx512_bf16_supported":
                return lambda: False
            return getattr(torch.cpu, name)

    class _Torch:
        cpu = _NoBf16Kernels()

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    module.torch = _Torch()


def _import_if_there(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
