"""The gradient of a linear layer as the two thin factors that it is the product of.

G = U^T V, with U [T, a] and V [T, b] for T tokens; G itself is never made. What APOLLO and a guard
need follows from the factors exactly, products summed in float32, where autograd rounds G to the
weights' dtype first. Norms by Gram matrices: Goodfellow, arXiv 1510.01799.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # of one matrix, float32: [t, a] and [t, b]


@dataclass(frozen=True, eq=False)
class Factored:
    """G = left^T right of a matrix [a, b]; of a stack [E, a, b], one product for each expert.

    Attributes:
        left: U [T, a], of a float dtype, without gaps.
        right: V [T, b], likewise.
        ends: int32 [E], on the factors' device: expert e has the tokens from ends[e - 1] (0 for
            the first) to ends[e]; None for a matrix.
    """

    left: Tensor
    right: Tensor
    ends: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the gradient."""
        count = () if self.ends is None else self.ends.shape
        return torch.Size((*count, self.left.shape[1], self.right.shape[1]))

    @property
    def ndim(self) -> int:
        """Of the gradient: 2 or 3."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        """Of the factors."""
        return self.left.device

    @property
    def tokens(self) -> int:
        """T."""
        return self.left.shape[0]

    def tokens_of(self) -> list[slice]:
        """The tokens of each matrix; waits for the device where there are experts."""
        if self.ends is None:
            return [slice(0, self.tokens)]
        ends = self.ends.tolist()
        return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]

    def matrices(self) -> Iterator[Factors]:
        """Both factors of each matrix."""
        for tokens in self.tokens_of():
            yield self.left[tokens].float(), self.right[tokens].float()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """G, of its shape; summed in float32."""
        if self.dtype == dtype and self.ends is None:
            return self.left.mT @ self.right
        if self.dtype == dtype and self._grouped():
            return torch._grouped_mm(self.left.mT, self.right, offs=self.ends)
        products = [(left.mT @ right).to(dtype) for left, right in self.matrices()]
        return torch.stack(products).view(self.shape)

    def _grouped(self) -> bool:
        """Whether torch multiplies experts without the host, which a CUDA graph may not ask."""
        sizes = (self.left.shape[1], self.right.shape[1])
        fits = self.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)
        return self.left.is_cuda and fits

    def norm(self) -> Tensor:
        """|G|, float32, 0-dim: |G|^2 = <U U^T, V V^T>. Not finite where a factor is not."""
        if self.ends is None:
            return _square(self.left, self.right).sqrt()
        squares = [_square(left, right) for left, right in self.matrices()]
        return torch.stack(squares).sum().sqrt()


Gradient = Tensor | Factored


class Projection:
    """R = P G and the norms of G's channels, for the factors of one matrix.

    With A the factor of the larger side and B the other, R = (P B^T) A, and
    |G_j|^2 = a_j^T (B B^T) a_j.

    Args:
        P: float32 [r, m], with m the smaller side.
        tall: whether the larger side is that of the first factor.
    """

    def __init__(self, factors: Factors, P: Tensor, tall: bool):
        left, right = factors
        self._A, B = (left, right) if tall else (right, left)
        self._Q, self._gram = P @ B.mT, B @ B.mT

    def project(self, channels: slice, R: Tensor, norms: Tensor) -> None:
        """Fills columns of R [r, n], and norms, which has the channels' length."""
        A = self._A[:, channels]
        R[:, channels] = self._Q @ A
        torch.sum((self._gram @ A).mul_(A), 0, out=norms).clamp_(min=0).sqrt_()


def _square(left: Tensor, right: Tensor) -> Tensor:
    left, right = left.float(), right.float()
    return ((left @ left.mT) * (right @ right.mT)).sum().clamp_(min=0)


def norm_of(gradient: Gradient) -> Tensor:
    """|G|, float32, 0-dim; nothing waits for the device but for a stack's factors."""
    if isinstance(gradient, Factored):
        return gradient.norm()
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return norm


def scaled(gradient: Gradient, factor: float) -> Gradient:
    """A gradient times a factor; a tensor is changed in place.

    Of two factors the smaller is copied, as what they were made of may be another's as well.
    """
    if isinstance(gradient, Tensor):
        return gradient.mul_(factor)
    if gradient.left.numel() <= gradient.right.numel():
        return Factored(gradient.left * factor, gradient.right, gradient.ends)
    return Factored(gradient.left, gradient.right * factor, gradient.ends)


def total(gradients: Sequence[Gradient]) -> Gradient:
    """The sum of gradients of one shape: their factors one after another, or in float32."""
    if len(gradients) == 1:
        return gradients[0]
    factored = [g for g in gradients if isinstance(g, Factored)]
    if len(factored) == len(gradients):
        return joined(factored)
    parts = [g.dense() if isinstance(g, Factored) else g.float() for g in gradients]
    return torch.stack(parts).sum(0)


def joined(parts: Sequence[Factored]) -> Factored:
    """The sum of products as one product of longer factors; an expert's tokens stay together."""
    if len(parts) == 1:
        return parts[0]
    left, right = (torch.cat([getattr(p, side) for p in parts]) for side in ("left", "right"))
    if parts[0].ends is None:
        return Factored(left, right)
    experts = torch.cat([_experts(part) for part in parts])
    order = torch.argsort(experts, stable=True)
    numbers = torch.arange(len(parts[0].ends), device=experts.device)
    ends = torch.searchsorted(experts[order], numbers, right=True)
    return Factored(left[order], right[order], ends.to(torch.int32))


def _experts(part: Factored) -> Tensor:
    """Whose each token is."""
    assert part.ends is not None
    tokens = torch.arange(part.tokens, device=part.device)
    return torch.searchsorted(part.ends.to(torch.int64), tokens, right=True)
