"""What a step learns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TopTokens:
    """A teacher's k likeliest next tokens at each place of a continuation, on the CPU.

    Attributes:
        ids: int32 [T, k], the likeliest first.
        log_probs: float32 [T, k], in nats.
    """

    ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class TokenizedSample:
    """Token ids of the served model's vocabulary; the continuation is what is learned.

    Its loss is the divergence from `targets` where there are any, else the policy gradient of its
    `advantages` where there are any, else cross-entropy.

    Attributes:
        weight: factor on the whole sample's loss.
        token_weights: one factor a token that is learned, or empty for 1 each.
        teacher_context_ids: what a teacher reads in place of the context; empty for the context.
        advantages: one a continuation token; empty where it was not sampled.
        sampler_log_probs: of each continuation token when it was sampled, in nats.
        targets: what a teacher says of each continuation token; equal samples may differ in it.
        open_tokens: of the continuation's beginning, tokens of the context that run with gradient
            and are not learned; nothing above has an entry for one.
    """

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    weight: float = 1.0
    token_weights: tuple[float, ...] = ()
    teacher_context_ids: tuple[int, ...] = ()
    advantages: tuple[float, ...] = ()
    sampler_log_probs: tuple[float, ...] = ()
    targets: TopTokens | None = field(default=None, compare=False, repr=False)
    open_tokens: int = 0

    @property
    def learned_tokens(self) -> int:
        """Tokens that are learned."""
        return len(self.continuation_ids) - self.open_tokens

    def opened(self, most: int) -> TokenizedSample:
        """The same, with a gradient through the context's last tokens; its first one has none."""
        cut = max(1, len(self.context_ids) - most)
        begin, rest = self.context_ids[:cut], self.context_ids[cut:]
        return replace(
            self,
            context_ids=begin,
            continuation_ids=rest + self.continuation_ids,
            open_tokens=self.open_tokens + len(rest),
        )

    @property
    def plain(self) -> TokenizedSample:
        """The same, whose loss is cross-entropy."""
        return replace(self, targets=None, advantages=())

    @property
    def has_policy_loss(self) -> bool:
        """Whether its loss is a policy gradient's, which may be negative."""
        return self.targets is None and bool(self.advantages)


@dataclass
class TokenCounts:
    """Tokens of samples.

    Attributes:
        longest: of one sample, context and continuation.
    """

    context: int = 0
    continuation: int = 0
    longest: int = 0

    def counting(self, samples: Iterable[TokenizedSample]) -> Iterator[TokenizedSample]:
        """The same samples, each counted as it passes."""
        for sample in samples:
            context, continuation = len(sample.context_ids), len(sample.continuation_ids)
            self.context += context
            self.continuation += continuation
            self.longest = max(self.longest, context + continuation)
            yield sample
