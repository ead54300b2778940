"""A model without memory that computes what a model on a CUDA device does.

Its tensors are on torch's meta device: only their shapes, and when they come and go, are known.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface

from apollo_trainer.training.attention import NAME, grouped_attention, grouped_mask
from apollo_trainer.training.norms import fuse_norms
from apollo_trainer.weights.live_model import meta_model

try:
    from triton.runtime.jit import KernelInterface
except ImportError:
    KernelInterface = None

_NAME = "attention_on_cuda"
_HALF, _LARGEST_HEAD = (torch.bfloat16, torch.float16), 256


def twin_of(model: Any) -> Any:
    """The twin of a model of transformers: its shapes, strides, ties and kernels."""
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): _without_memory(tensor) for tensor in tensors})
    if getattr(twin.config, "_attn_implementation", "") == NAME:
        _attend_as_on_cuda(twin)
    return twin


def twin_of_directory(directory: Path) -> Any:
    """The twin of the model that vLLM serves from a directory, as `speed_up` makes it faster.

    Weights that are float32 there are taken for bfloat16, as vLLM has them on a GPU.

    Raises FailedPrecondition as `meta_model` does.
    """
    model = meta_model(str(directory)).eval()
    if all(p.dtype == torch.float32 for p in model.parameters()):
        model.to(torch.bfloat16)
    # Whether a module is an RMS norm is found by trying it, for which it needs values.
    norms = [module for module in model.modules() if _may_be_norm(module)]
    for module in norms:
        nn.init.uniform_(module.to_empty(device="cpu").weight, 0.5, 1.5)
    fuse_norms(model)
    for module in norms:
        module.to("meta")
    if getattr(model.config.get_text_config(), "hidden_act", "") in ("silu", "swish"):
        with suppress(ImportError), Kernels(answer=True):
            from apollo_trainer.training.kernels.gated import fuse_gated

            fuse_gated(model)
    if getattr(model.config, "_attn_implementation", "") in ("sdpa", "eager"):
        _attend_as_on_cuda(model)
    return model


def _attend_as_on_cuda(model: Any) -> None:
    AttentionInterface.register(_NAME, grouped_attention)
    AttentionMaskInterface.register(_NAME, grouped_mask)
    model.set_attn_implementation(_NAME)


def _may_be_norm(module: nn.Module) -> bool:
    own = list(module.parameters())
    return len(own) == 1 and own[0] is getattr(module, "weight", None) and own[0].ndim == 1


def _without_memory(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty


class Kernels(TorchFunctionMode):
    """Around passes of a twin: its tensors say that they are on a CUDA device.

    torch then uses the kernels that it has there, and Triton's are not launched. Within a backward
    pass, which torch runs outside such modes, tensors say where they are.

    Args:
        answer: to a question about values, which nobody knows. No is what transformers takes for
            the answer where a graph is captured: that masks may not be left out.
    """

    def __init__(self, *, answer: bool = False):
        super().__init__()
        self._answer = answer

    def __enter__(self) -> Self:
        _thread.within = getattr(_thread, "within", 0) + 1
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        _thread.within -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls `func`, or the kernel, or answers for it."""
        if func == _IS_CUDA:
            return args[0].is_meta
        if func is Tensor.__bool__ and args[0].is_meta:
            return self._answer
        kernel = _KERNELS.get(func)
        result = kernel(*args, **(kwargs or {})) if kernel else None
        return func(*args, **(kwargs or {})) if result is None else result


_IS_CUDA = vars(torch._C.TensorBase)["is_cuda"].__get__
_thread = threading.local()


def _unless_told(launcher: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Triton's `kernel[grid]`; a kernel would read the address of what has no memory."""

    def launch(kernel: Any, grid: Any) -> Any:
        if getattr(_thread, "within", 0):
            return lambda *args, **kwargs: None
        return launcher(kernel, grid)

    return launch


if KernelInterface is not None:
    KernelInterface.__getitem__ = _unless_told(KernelInterface.__getitem__)


class _Norm(torch.autograd.Function):
    """What torch's RMS norm keeps; without a device it would multiply out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """[..., n] and [n]: [..., n]."""
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Of both."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _rms_norm(
    input: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor | None:
    if weight is None or weight.ndim != 1:
        return None
    normed: Tensor = _Norm.apply(input, weight)  # type: ignore[no-untyped-call]
    return normed


def _attended(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:  # fmt: skip
    """By cuDNN's kernel, which takes what the others take; None where torch multiplies out."""
    if query.dtype not in _HALF or query.shape[-1] > _LARGEST_HEAD:
        return None
    bias = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
    attended: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale
    )
    return attended[0]


_KERNELS: dict[Any, Callable[..., Tensor | None]] = {
    F.rms_norm: _rms_norm,
    F.scaled_dot_product_attention: _attended,
}
