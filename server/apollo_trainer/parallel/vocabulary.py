"""A vocabulary that ranks divide: what is asked of logits, without any rank having all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apollo_grpc.region import Region
from apollo_trainer.parallel.collectives import summed
from apollo_trainer.parallel.ranks import ALONE, Ranks

# Stands for -inf where it is subtracted from itself.
_LOWEST = torch.finfo(torch.float32).min


class Vocabulary:
    """The tokens of one rank: `count` from `first` on.

    Args:
        region: of the head's weight, whose rows are one run.
    """

    def __init__(self, region: Region, ranks: Ranks):
        ((self.first, self.count),) = region.runs[0]
        self.size, self.ranks = region.root[0], ranks

    def own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Places of tokens among this rank's, 0 for others; and which are this rank's."""
        places = ids - self.first
        mine = (places >= 0) & (places < self.count)
        return torch.where(mine, places, 0), mine

    def pick(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The logits of tokens, wherever they are.

        Args:
            logits: this rank's, float32 [N, count].
            ids: int64 [N, k].

        Returns float32 [N, k], with gradient.
        """
        places, mine = self.own(ids)
        return summed(logits.gather(1, places).masked_fill(~mine, 0.0), self.ranks)

    def without(self, logits: Tensor, ids: Tensor) -> Tensor:
        """This rank's logits, -inf for these tokens: int64 [N, k]."""
        places, mine = self.own(ids)
        chosen = torch.zeros(logits.shape, dtype=torch.int8, device=logits.device)
        chosen.scatter_reduce_(1, places, mine.to(torch.int8), "amax")
        return logits.masked_fill(chosen.bool(), -torch.inf)

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        """Of all ranks' logits [N, count]: [N, 1], with gradient."""
        return _LogSumExp.apply(logits, self.ranks)  # type: ignore[no-untyped-call, no-any-return]

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of all ranks' logits [N, count] and their tokens: [N, k] each."""
        own, size = logits.topk(min(k, self.count), 1), self.ranks.size
        values = logits.new_full((len(logits), size, k), -torch.inf)
        ids = torch.zeros_like(values, dtype=torch.int64)
        values[:, self.ranks.rank, : own.values.shape[1]] = own.values
        ids[:, self.ranks.rank, : own.values.shape[1]] = own.indices + self.first
        self.ranks.largest(values)
        self.ranks.sum(ids)
        found = values.flatten(1).topk(min(k, self.size), 1)
        return found.values, ids.flatten(1).gather(1, found.indices)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ranks: Ranks) -> Tensor:
        """Two sums over ranks, of one number a row each."""
        most = logits.amax(1, keepdim=True).clamp_(min=_LOWEST)
        ranks.largest(most)
        total = (logits - most).exp_().sum(1, keepdim=True)
        ranks.sum(total)
        found = total.log_().add_(most)
        ctx.save_for_backward(logits, found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """This rank's part of the softmax; the gradient is the same on all ranks."""
        logits, found = ctx.saved_tensors
        return (logits - found.clamp(min=_LOWEST)).exp_().mul_(grads[0]), None


def vocabulary_of(model: Any) -> Vocabulary | None:
    """Whose tokens a model's logits are of; None where they are of all."""
    return getattr(model, "divided_vocabulary", None)


def vocabulary_size(model: Any) -> int:
    """Rows of the embedding, on all ranks together."""
    divided = vocabulary_of(model)
    return int(model.get_input_embeddings().weight.shape[0]) if divided is None else divided.size


def everywhere(model: Any, said: bool) -> bool:
    """Whether it is so of the logits of all ranks, which then all do the same."""
    if (divided := vocabulary_of(model)) is None:
        return said
    against = torch.tensor(int(not said), device=model.device)
    divided.ranks.sum(against)
    return not int(against)


def log_probs_of(model: Any, logits: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of each row's target: [N, 1], of a model's logits [N, V], float32."""
    if (divided := vocabulary_of(model)) is None:
        return torch.log_softmax(logits, -1).gather(1, targets)
    return divided.pick(logits, targets) - divided.log_sum_exp(logits)


def ranks_of(model: Any) -> Ranks:
    """Those that compute with a model together."""
    divided = vocabulary_of(model)
    return ALONE if divided is None else divided.ranks
