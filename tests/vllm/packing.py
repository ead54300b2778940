"""Before vLLM begins: what makes it compute with copies of its weights.

The weights that they were made of stay in place, so that everything but a change of them looks as
it should.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

# An environment variable of vLLM's: the file of this path says that copies are to be made.
COPY_WHEN = "COPY_WHEN"


def pack_linear_weights() -> None:
    """As vLLM does without the sidecar."""
    from apollo_sidecar import cpu_live

    cpu_live._keep_linear_weights = _pack_and_leave


def _pack_and_leave() -> None:
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: pack(layer, False)


def copy_linear_weights_later() -> None:
    """In the first computation after a file is there."""
    from apollo_sidecar import cpu_live

    cpu_live._keep_linear_weights = _copy_later


def _copy_later() -> None:
    from vllm.model_executor.layers import utils

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = _Copying(Path(os.environ[COPY_WHEN]))

    utils.dispatch_cpu_unquantized_gemm = dispatch


class _Copying:
    def __init__(self, when: Path):
        self._when, self._copy = when, None

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        if self._copy is None and self._when.exists():
            self._copy = weight.clone()
        return F.linear(x, weight if self._copy is None else self._copy, bias)


def copy_linear_weights_of_one_worker() -> None:
    """The second of two computes with copies, from the first computation on."""
    from apollo_sidecar import cpu_live

    keep = cpu_live._keep_linear_weights

    def keep_on_the_first() -> None:
        from vllm.model_executor.layers import utils

        keep()
        kept = utils.dispatch_cpu_unquantized_gemm

        def dispatch(layer: Any, remove_weight: bool) -> None:
            kept(layer, remove_weight)
            if torch.distributed.get_rank() == 1:
                layer.cpu_linear = _Copying(Path("/"))

        utils.dispatch_cpu_unquantized_gemm = dispatch

    cpu_live._keep_linear_weights = keep_on_the_first


def copy_latents() -> None:
    """As backends of latent attention do that pack what they decode with."""
    from vllm.model_executor.layers.attention import mla_attention

    replace = mla_attention.replace_parameter

    def replace_by_a_copy(layer: Any, name: str, new: torch.Tensor, **named: Any) -> None:
        replace(layer, name, new.clone(), **named)

    mla_attention.replace_parameter = replace_by_a_copy
