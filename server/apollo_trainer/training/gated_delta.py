"""The gated delta rule in plain torch, a quarter of the kernels that transformers' code has.

Yang et al., arXiv 2412.06464, in the form with one triangular system: what a token writes to the
state is found for a block of tokens at once, the state before the block included. With a block as
long as what is learned there is no loop, and next to nothing for a GPU to wait for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # Tokens; what is within a block grows with their square.


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = BLOCK,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Takes and gives what transformers' `torch_chunk_gated_delta_rule` does; in float32 within.

    Args:
        query, key: [B, T, H, k]; value: [B, T, H, v].
        g: logarithms of decays [B, T, H], none above 0.
        beta: rates of writing [B, T, H].
        chunk_size: of transformers'; a block's size is chosen here.
        initial_state: [B, H, k, v]; zeros if there is none.

    Returns the outputs [B, T, H, v] in query's dtype, and the last state where it is asked for.
    """
    dtype = query.dtype
    queries, keys, values, decays, rates = (
        each.transpose(1, 2).float() for each in (query, key, value, g, beta)
    )
    if use_qk_l2norm_in_kernel:
        queries, keys = _normal(queries), _normal(keys)
    queries = queries * queries.shape[-1] ** -0.5
    state = (
        values.new_zeros(*keys.shape[:2], keys.shape[-1], values.shape[-1])
        if initial_state is None
        else initial_state.float()
    )
    outputs = []
    for begin in range(0, queries.shape[2], BLOCK):
        tokens = slice(begin, begin + BLOCK)
        q, k, v, d, r = (x[:, :, tokens] for x in (queries, keys, values, decays, rates))
        output, state = _block(q, k, v, d, r, state)
        outputs.append(output)
    result = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    result = result.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)
    return result, state if output_final_state else None


def _normal(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _block(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The outputs [B, H, T, v] of tokens after a state [B, H, k, v], and the state after them."""
    total = decay.cumsum(-1)
    tokens, rate = total.shape[-1], rate[..., None]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=key.device).triu(1)
    # What of token j is left at token i.
    left = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    since = total.exp()[..., None]
    # Each token writes what the state, and the tokens before it, do not say of its key yet.
    system = (key * rate) @ key.mT * left
    new = (value - (key * since) @ state) * rate
    new = torch.linalg.solve_triangular(system, new, upper=False, unitriangular=True)
    output = (query * since) @ state + (query @ key.mT * left) @ new
    until = (total[..., -1:] - total).exp()[..., None]
    return output, state * since[..., -1:, :] + (key * until).mT @ new
