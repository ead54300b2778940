"""The processes that train one model together: torch.distributed, or one process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Tell = Callable[..., None]


class RankRefused(Exception):
    """Another rank did not go on, and says why."""

    def __str__(self) -> str:
        return "another trainer rank failed, and its log has why"


class Ranks:
    """The trainer's ranks. Each calls the same methods in the same order, or all wait.

    Args:
        group: of torch.distributed; None for a process alone, which waits for nobody.
        tell: on the first rank, has all others do something, by its name, and what it takes.
        give_up: on the first rank, ends all others.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        tell: Tell = lambda do, **how: None,
        give_up: Callable[[], None] = lambda: None,
    ):
        self._group, self.tell, self._give_up = group, tell, give_up
        self._agreed: BaseException | None = None
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def sum(self, *tensors: Tensor) -> None:
        """Puts the sum over ranks into each tensor; the same bits on every rank."""
        kinds = dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors)
        for kind in kinds if self.size > 1 else ():
            same = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == kind]
            if len(same) == 1 and same[0].is_contiguous():
                dist.all_reduce(same[0], group=self._group)
                continue
            whole = torch.cat([tensor.reshape(-1) for tensor in same])
            dist.all_reduce(whole, group=self._group)
            parts = torch.split(whole, [tensor.numel() for tensor in same])
            for tensor, summed in zip(same, parts, strict=True):
                tensor.copy_(summed.view(tensor.shape))

    def largest(self, tensor: Tensor) -> None:
        """Puts the largest over ranks into each element."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group)

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        told = torch.tensor(-number)
        self.largest(told)
        return -int(told)

    def agree(self, act: Callable[[], None]) -> None:
        """Does something on this rank, and goes on if no rank failed at it.

        Raises what `act` raised, or RankRefused where another rank's did.
        """
        if self.size == 1:
            act()
            return
        error: BaseException | None = None
        try:
            act()
        except BaseException as raised:
            error = raised
        failed = torch.tensor(int(error is not None))
        self.sum(failed)
        self._agreed = error
        if error is not None:
            raise error
        if int(failed):
            self._agreed = RankRefused()
            raise self._agreed

    @contextmanager
    def telling(
        self,
        do: str,
        how: Callable[[], dict[str, Any]],
        alike: tuple[type[BaseException], ...] = (),
    ) -> Iterator[None]:
        """Around what all ranks do; where one rank alone breaks off, no rank can go on.

        Args:
            how: what it takes; asked for where there are other ranks.
            alike: errors that come up on all ranks.
        """
        if self.size > 1:
            self.tell(do, **how())
        try:
            yield
        except BaseException as error:
            if error is not self._agreed and not isinstance(error, alike):
                self._give_up()
            raise

    def meet(self, device: torch.device) -> None:
        """Waits until all ranks' GPUs have done what they were given; where others are."""
        if self.size > 1:
            self.agree(lambda: torch.cuda.synchronize(device))

    def first(self, own: list[float]) -> list[float]:
        """What the first rank has, of as many numbers as each of them."""
        if self.size == 1:
            return own
        told = torch.tensor(own if self.rank == 0 else [0.0] * len(own), dtype=torch.float64)
        self.sum(told)
        return told.tolist()

    def norms(self, own: Tensor) -> Tensor:
        """Norms of all ranks' parts together, from those of each part: float, any shape."""
        if self.size == 1:
            return own
        # Infinite where a square is, as it is where the norm of one rank's part overflows.
        squares = own.to(torch.float64).square()
        self.sum(squares)
        return squares.sqrt().to(own.dtype)


ALONE = Ranks()
