"""Which parameters learn: chosen by name, and alone in having a gradient for a while."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from apollo_trainer.optim.parameters import place


def chosen(
    names: Iterable[str],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: Collection[int] = (),
) -> frozenset[str]:
    """The names that match a pattern of `include`, none of `exclude`, and are in one of `layers`.

    Args:
        include: patterns with `*`, `?` and `[...]`, case counts; none is every name.
        exclude: likewise; none is no name.
        layers: from 0; none is every layer, and what is in no layer.
    """
    return frozenset(
        name
        for name in names
        if (not include or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
        and (not layers or layer_of(name) in layers)
    )


def layer_of(name: str) -> int | None:
    """The first part of a name that is a number, as 3 in `model.layers.3.mlp.experts.7.w`."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


@contextmanager
def learning_only(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Inside, no other parameter has a gradient: steps write neither it nor its moments.

    A parameter of several names, or tied to another over one memory, learns by either name. One
    that had no gradient before has none inside. Training thread.

    Raises KeyError for a name that the model does not have; nothing is then changed.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    learning = {place(named[name]) for name in names}
    before = {param: param.requires_grad for param in named.values()}
    for param, learned in before.items():
        param.requires_grad_(learned and place(param) in learning)
    try:
        yield
    finally:
        for param, learned in before.items():
            param.requires_grad_(learned)
