"""Who must know of a write before it happens, behind the optimizer's one hook."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from torch import Tensor

Watcher = Callable[[Tensor], None]


class WriteWatch:
    """Set as `Apollo.before_param_write`; calls all watchers, in the order that they were added."""

    def __init__(self) -> None:
        self._watchers: list[Watcher] = []

    def __call__(self, parameter: Tensor) -> None:
        """Calls all watchers."""
        for watcher in tuple(self._watchers):
            watcher(parameter)

    def add(self, watcher: Watcher) -> None:
        """Adds a watcher, for the writes from now on."""
        self._watchers.append(watcher)

    def remove(self, watcher: Watcher) -> None:
        """Removes a watcher, if it is there."""
        if watcher in self._watchers:
            self._watchers.remove(watcher)


class WriteVersions:
    """A number for each parameter: another one after every write, and in every process."""

    # Two that are equal by chance would hide a write: 62 bits, and still a JSON number.
    _BITS = 62

    def __init__(self) -> None:
        self._before_any = secrets.randbits(self._BITS)
        self._versions: dict[int, int] = {}

    def before_write(self, parameter: Tensor) -> None:
        """Gives the parameter a new number; a write that then fails may have changed it too."""
        self._versions[id(parameter)] = secrets.randbits(self._BITS)

    def of(self, parameter: Tensor) -> int:
        """The parameter's number now."""
        return self._versions.get(id(parameter), self._before_any)
