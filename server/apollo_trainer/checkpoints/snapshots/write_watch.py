"""Several who must know of a write before it happens, behind the optimizer's one hook."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

Watcher = Callable[[Tensor], None]


class WriteWatch:
    """Set as `Apollo.before_param_write`; tells all watchers, in the order that they came in."""

    def __init__(self) -> None:
        self._watchers: list[Watcher] = []

    def __call__(self, parameter: Tensor) -> None:
        """Tells all."""
        for watcher in tuple(self._watchers):
            watcher(parameter)

    def add(self, watcher: Watcher) -> None:
        """Tells this one too, from now on."""
        self._watchers.append(watcher)

    def remove(self, watcher: Watcher) -> None:
        """Tells it no more; nothing happens where it was not told."""
        if watcher in self._watchers:
            self._watchers.remove(watcher)

    @contextmanager
    def telling(self, watcher: Watcher) -> Iterator[None]:
        """Tells it within the block."""
        self.add(watcher)
        try:
            yield
        finally:
            self.remove(watcher)


class WriteVersions:
    """A number for each parameter that is another one after every write, and in every process."""

    # Two that are equal by chance would hide a write: 62 bits, and still a JSON number.
    _BITS = 62

    def __init__(self) -> None:
        self._before_any = secrets.randbits(self._BITS)
        self._versions: dict[int, int] = {}

    def before_write(self, parameter: Tensor) -> None:
        """The parameter is about to be written; one that fails halfway has changed it too."""
        self._versions[id(parameter)] = secrets.randbits(self._BITS)

    def of(self, parameter: Tensor) -> int:
        """The parameter's number now."""
        return self._versions.get(id(parameter), self._before_any)
