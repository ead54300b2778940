"""The losses of a token: cross-entropy, the divergence from a teacher, a policy gradient.

All begin with the logarithm of the student's softmax, float32 [tokens, V], which is made once. The
divergence makes one more tensor of that size, and one in its backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from apollo_trainer.parallel.vocabulary import Vocabulary

IGNORED = -100  # nll_loss's own mark: no loss and no gradient
# Stands for the logarithm of 0 where it is multiplied by a probability of 0.
_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Clip:
    """How far a token's ratio may fall below 1, and rise above it, before it no longer counts.

    0 is no limit; from 1 on `low` is none either.
    """

    low: float = 0.2
    high: float = 0.2

    def limited(self, log_ratios: Tensor, advantages: Tensor) -> Tensor:
        """The ratios' logarithms, cut where they would have counted for more than they may."""
        least = math.log1p(-self.low) if 0 < self.low < 1 else -math.inf
        most = math.log1p(self.high) if self.high > 0 else math.inf
        return torch.where(advantages >= 0, log_ratios.clamp(max=most), log_ratios.clamp(min=least))


DEFAULT_CLIP = Clip()


class Targets(NamedTuple):
    """What the tokens of a micro-batch learn, in rows padded to T, on one device.

    Attributes:
        ids: int64 [samples, T]; IGNORED has no loss.
        weights: float32 [samples, T].
        top_ids: int64 [samples, T, k], of a teacher's likeliest tokens; None where no sample has
            a teacher.
        top_log_probs: float32 [samples, T, k]; -inf where a token has no teacher.
        policy: advantages and sampler's log-probabilities, float32 [2, samples, T], the second inf
            where a token has another loss; None where all have.
    """

    ids: Tensor
    weights: Tensor
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None
    policy: Tensor | None = None


def weighed(
    logits: Tensor, targets: Targets, clip: Clip, vocabulary: Vocabulary | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of weight times loss, and sums over each sample's tokens, without weights.

    The first is a scalar with gradient. The second is float32 [n, samples], detached: losses in
    nats; and where some are of a policy gradient, its ratios, what log-probabilities fell by, and
    how many ratios were clipped.

    Args:
        logits: [samples, T, V].
        vocabulary: whose logits they are; None for those of all tokens.
    """
    rows = logits.flatten(0, 1).float()
    student = _Whole(rows) if vocabulary is None else _Divided(rows, vocabulary)
    losses, figures = _of_tokens(student, targets, clip)
    weighted = (losses.view_as(targets.ids) * targets.weights).sum()
    told = torch.stack([losses.detach(), *figures]) if figures else losses.detach()
    return weighted, told.view(-1, *targets.ids.shape).sum(2)


class _Whole:
    """What is said of all tokens, by logits [N, V]."""

    def __init__(self, logits: Tensor):
        self._log_probs = F.log_softmax(logits, 1)

    def entropies(self, ids: Tensor) -> Tensor:
        """-ln p of each token; 0 for those IGNORED."""
        return F.nll_loss(self._log_probs, ids, reduction="none", ignore_index=IGNORED)

    def divergence(self, ids: Tensor, teacher: Tensor) -> Tensor:
        """As `divergence`."""
        return divergence(self._log_probs, ids, teacher)


class _Divided:
    """The same where each rank has the logits of some tokens; no rank ever has all of them."""

    def __init__(self, logits: Tensor, vocabulary: Vocabulary):
        self._logits, self._vocabulary = logits, vocabulary
        self._all = vocabulary.log_sum_exp(logits)

    def entropies(self, ids: Tensor) -> Tensor:
        """-ln p of each token; 0 for those IGNORED."""
        found = self._all - self._vocabulary.pick(self._logits, ids.clamp(min=0)[:, None])
        return found[:, 0].masked_fill(ids == IGNORED, 0.0)

    def divergence(self, ids: Tensor, teacher: Tensor) -> Tensor:
        """As `divergence`."""
        others = self._vocabulary.log_sum_exp(self._vocabulary.without(self._logits, ids))
        known = self._vocabulary.pick(self._logits, ids)
        heard = (torch.cat([known, others], 1) - self._all).clamp(min=_LOWEST)
        left = 1 - teacher.exp().sum(1, keepdim=True)
        # Where there are no others, what is left to 1 is rounding.
        left = torch.where(others > -math.inf, left.clamp(min=0), 0.0)
        said = torch.cat([teacher, left.log()], 1).clamp(min=_LOWEST)
        return (said.exp() * (said - heard)).sum(1)


def _of_tokens(
    student: _Whole | _Divided, targets: Targets, clip: Clip
) -> tuple[Tensor, list[Tensor]]:
    """Losses [N] with gradient, and figures [N] beside them."""
    ids = targets.ids.flatten()
    losses = entropies = student.entropies(ids)
    figures: list[Tensor] = []
    if targets.top_ids is not None and targets.top_log_probs is not None:
        teacher = targets.top_log_probs.flatten(0, 1)
        found = student.divergence(targets.top_ids.flatten(0, 1), teacher)
        losses = torch.where(teacher[:, 0] > -math.inf, found, losses)
    if targets.policy is not None:
        advantages, sampler = targets.policy.flatten(1)
        log_ratios, sampled = -entropies - sampler, sampler < math.inf
        found = surrogate(log_ratios, advantages, clip)
        losses = torch.where(sampled, found, losses)
        figures = _policy_figures(log_ratios.detach(), sampled, advantages, clip)
    return losses, figures


def divergence(log_probs: Tensor, ids: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) in nats, [N], of k tokens one by one and all others as one.

    It is never below 0 but for rounding, and with k = V the divergence of the whole distributions.

    Args:
        log_probs: the student's, [N, V], normalised.
        ids: int64 [N, k]; those repeated need a teacher's -inf.
        teacher: log-probabilities [N, k]; what their sum leaves to 1 is that of all others.
    """
    return _Divergence.apply(log_probs, ids, teacher)  # type: ignore[no-untyped-call, no-any-return]


def surrogate(log_ratios: Tensor, advantages: Tensor, clip: Clip) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A); Schulman et al., arXiv 1707.06347, equation 7.

    Args:
        log_ratios: ln r, of a token's probability now over that when it was sampled.
    """
    return -advantages * clip.limited(log_ratios, advantages).exp()


def _policy_figures(
    log_ratios: Tensor, sampled: Tensor, advantages: Tensor, clip: Clip
) -> list[Tensor]:
    clipped = sampled & (clip.limited(log_ratios, advantages) != log_ratios)
    return [log_ratios.exp(), torch.where(sampled, -log_ratios, 0.0), clipped.to(log_ratios.dtype)]


class _Divergence(torch.autograd.Function):
    """A function of its own, as autograd would keep and make several tensors [N, V]."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, ids: Tensor, teacher: Tensor) -> Tensor:
        """As `divergence`. The others' mass is summed, as 1 minus that of the k may be rounding."""
        others = log_probs.scatter(1, ids, -math.inf)
        most = others.amax(1, keepdim=True).clamp_(min=_LOWEST)
        rest = others.sub_(most).exp_().sum(1, keepdim=True).log_().add_(most)
        del others
        known = teacher.exp()
        # Where there are no others, what is left to 1 is rounding.
        left = torch.where(rest > -math.inf, (1 - known.sum(1, keepdim=True)).clamp_(min=0), 0.0)
        said = torch.cat([teacher, left.log()], 1).clamp_(min=_LOWEST)
        heard = torch.cat([log_probs.gather(1, ids), rest], 1).clamp_(min=_LOWEST)
        ctx.save_for_backward(log_probs, ids, known, left, rest)
        return (torch.cat([known, left], 1) * (said - heard)).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of the divergence, [N]: -p of the k, and of the others their share in the rest's -p."""
        log_probs, ids, known, left, rest = ctx.saved_tensors
        slope = (log_probs - rest.clamp(min=_LOWEST)).exp_().mul_(-left)
        slope.scatter_(1, ids, 0.0).scatter_add_(1, ids, -known)
        return slope.mul_(grads[0][:, None]), None, None
